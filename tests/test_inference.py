"""Asking for real: mp4 files with sound through decode, towers, splice and language model."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from clips import make_clip
from PIL import Image
from tiny import tiny

import av_llava
import av_llava.errors
from av_llava.errors import AVLlavaError, BudgetError, MediaError, UsageError
from av_llava.inference import AVLlava, plan

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {
        "sound": make_clip(folder / "sound.mp4", seconds=4, fps=10, size=(160, 120), audio="tone"),
        "mute": make_clip(folder / "mute.mp4", seconds=3, fps=10, size=(160, 120), audio=None),
        "silent": make_clip(
            folder / "silent.mp4", seconds=3, fps=10, size=(160, 120), audio="silent"
        ),
    }


@pytest.fixture(scope="module")
def m():
    model, processor = tiny("llama")
    return AVLlava(model, processor, "tiny")


def test_an_answer_says_what_was_used(m, clips):
    answer = m.ask(clips["sound"], "What happens?", frames=8, max_new_tokens=4)
    (use,) = answer.media
    assert str(answer) == answer.text
    assert use.kind == "video" and len(use.pts_s) == 8 and use.n_source_frames == 40
    assert use.backend == "pyav" and use.audio_s == pytest.approx(4.0) and use.audio_tokens == 20
    assert use.audio_reason is None
    usage = answer.usage
    assert usage.completion_tokens == 4 and answer.finish_reason == "length"
    assert usage.video_tokens == use.n_tokens and usage.audio_tokens == 20
    assert "8/40 frames 0.00-3.90 s" in answer.used() and "cpu float32" in answer.used()
    data = json.loads(json.dumps(answer.to_dict()))
    assert data["schema"] == "av-llava/1" and data["answer"] == answer.text
    assert data["media"][0]["audio"] == {
        "used": True,
        "seconds": 4.0,
        "tokens": 20,
        "source": None,
        "reason": None,
    }


def test_sound_is_heard_and_can_be_muted(m, clips):
    heard = m.ask(clips["sound"], "What?", max_new_tokens=1)
    muted = m.ask(clips["sound"], "What?", max_new_tokens=1, audio="off")
    assert muted.usage.audio_tokens == 0 and muted.media[0].audio_reason == "off"
    # Start and end token go with the sound.
    assert heard.usage.prompt_tokens - muted.usage.prompt_tokens == heard.usage.audio_tokens + 2


def test_a_video_without_sound_is_no_error_unless_sound_was_asked_for(m, clips):
    answer = m.ask(clips["mute"], "What?", max_new_tokens=1)
    assert answer.media[0].audio_reason == "no sound track"
    assert "no audio (no sound track)" in answer.used()
    with pytest.raises(MediaError, match="mute.mp4"):
        m.ask(clips["mute"], "What?", audio="on")


def test_a_silent_track_is_sound(m, clips):
    assert m.ask(clips["silent"], "What?", max_new_tokens=1).usage.audio_tokens == 15


def test_a_separate_sound_file_takes_the_place_of_the_videos_own(m, clips):
    answer = m.ask(clips["mute"], "What?", audio=str(clips["sound"]), max_new_tokens=1)
    # Cut to the span of the video, which lasts 3 s; the file has 4 s.
    assert answer.media[0].audio_s == pytest.approx(3.0)
    assert answer.media[0].audio_source == str(clips["sound"]) in answer.used()
    with pytest.raises(MediaError, match="nowhere.wav does not exist"):
        m.ask(clips["mute"], "What?", audio="nowhere.wav")


@pytest.mark.parametrize("key", ["sound", "mute"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"frames": 5},
        {"fps": 2},
        {"start_s": 1.0, "end_s": 2.5},
        {"aggregator": "budget:60"},
        {"max_visual_tokens": 40},
        {"time_instruction": True},
    ],
)
def test_the_plan_made_from_headers_is_exact(m, clips, tmp_path, key, options):
    m.model.save_pretrained(tmp_path)
    m.processor.save_pretrained(tmp_path)
    planned = plan(tmp_path, clips[key], "What?", **options)
    answer = m.ask(clips[key], "What?", max_new_tokens=1, **options)
    assert planned.usage.prompt_tokens == answer.usage.prompt_tokens
    assert planned.usage.video_tokens == answer.usage.video_tokens
    assert planned.media[0].pts_s == pytest.approx(answer.media[0].pts_s)


def test_a_token_budget_is_kept(m, clips):
    for budget in (24, 60, 200):
        answer = m.ask(clips["sound"], "What?", max_visual_tokens=budget, max_new_tokens=1)
        assert answer.usage.video_tokens <= budget


def test_a_batch_equals_single_questions(m, clips):
    rows = [
        {"media": clips["sound"], "prompt": "What happens here?"},
        {"prompt": "Who are you?"},
        {"media": [clips["mute"], clips["sound"]], "prompt": "<video> or <video>?", "id": "x"},
        {"media": Image.new("RGB", (80, 50), "red"), "prompt": "Which colour?"},
    ]
    together = m.ask_batch(rows, batch_size=3, max_new_tokens=6)
    for row, answer in zip(rows, together, strict=True):
        alone = m.ask(row.get("media"), row["prompt"], max_new_tokens=6)
        assert answer.text == alone.text and answer.usage == alone.usage


def test_streaming_gives_the_same_answer_in_pieces(m, clips):
    stream = m.stream(clips["sound"], "What?", max_new_tokens=6)
    assert stream.answer is None
    text = "".join(stream)
    alone = m.ask(clips["sound"], "What?", max_new_tokens=6)
    assert text.strip() == alone.text == stream.answer.text
    assert stream.answer.usage == alone.usage


def test_a_stream_can_be_cancelled(m, clips):
    stream = m.stream(clips["sound"], "What?", max_new_tokens=400)
    for i, _ in enumerate(stream):
        if i == 1:
            stream.cancel()
    assert stream.answer.finish_reason == "interrupted"
    assert stream.answer.usage.completion_tokens < 400


def test_leaving_a_stream_ends_its_thread(m, clips):
    before = threading.active_count()
    stream = iter(m.stream(clips["sound"], "What?", max_new_tokens=2000))
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_an_error_in_the_stream_reaches_the_caller():
    model, processor = tiny("llama")
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(AVLlavaError, match="not numbers"):
        list(AVLlava(model, processor).stream(None, "Hello"))


def test_overflow_is_an_error_and_not_an_answer():
    model, processor = tiny("llama")
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(AVLlavaError, match=r"not numbers \(it runs in float32\)"):
        AVLlava(model, processor).ask(None, "Hello")


def test_drawing_is_repeatable_with_a_seed(m):
    options = {"temperature": 1.5, "max_new_tokens": 12}
    a, b, c = (m.ask(None, "Tell me", seed=s, **options).text for s in (1, 1, 2))
    assert a == b != c


def test_chat_takes_all_spellings(m, clips):
    path = str(clips["sound"])
    hf = [
        {
            "role": "user",
            "content": [{"type": "video", "path": path}, {"type": "text", "text": "What?"}],
        }
    ]
    openai = [
        {
            "role": "user",
            "content": [
                {"type": "video_url", "video_url": {"url": f"file://{path}"}},
                {"type": "text", "text": "What?"},
            ],
        }
    ]
    answers = [m.chat(t, max_new_tokens=5).text for t in (hf, openai)]
    assert len({*answers, m.ask(path, "What?", max_new_tokens=5).text}) == 1
    more = [*hf, {"role": "assistant", "content": "A ball."}, {"role": "user", "content": "Which?"}]
    assert (
        m.chat(more, max_new_tokens=2).usage.text_tokens
        > m.chat(hf, max_new_tokens=2).usage.text_tokens
    )


def test_media_of_all_kinds_in_one_prompt(m, clips):
    frames = np.zeros((3, 40, 60, 3), np.uint8)
    samples = np.zeros(16_000, np.float32)
    answer = m.ask(
        [Image.new("L", (30, 90)), clips["sound"].read_bytes(), frames, samples],
        "First <image> then <video> and <video> with <audio>?",
        max_new_tokens=1,
    )
    assert [u.kind for u in answer.media] == ["image", "video", "video", "audio"]
    assert answer.usage.image_tokens == answer.media[0].n_tokens


@pytest.mark.parametrize(
    ("media", "prompt", "options", "error", "words"),
    [
        (None, "  ", {}, UsageError, "prompt is empty"),
        (None, "Hi", {"framse": 4}, UsageError, "Did you mean 'frames'"),
        (None, "Hi", {"frames": 0, "aggregator": "x"}, UsageError, "frames must be at least 1"),
        (None, "Hi", {"temperature": -1}, UsageError, "temperature"),
        (None, "Hi", {"max_new_tokens": 0}, UsageError, "max_new_tokens"),
        (None, "Hi", {"aggregator": "llava_vidoe"}, UsageError, "Did you mean 'llava_video'"),
        (None, "Hi", {"aggregator": "llava_video", "max_visual_tokens": 5}, UsageError, "not both"),
        (None, "Hi", {"audio": "loud"}, UsageError, "audio mode"),
        ("missing.mp4", "Hi", {}, MediaError, "missing.mp4"),
        (None, "What is <video>?", {}, UsageError, "video"),
    ],
)
def test_wrong_requests_say_what_is_wrong(m, media, prompt, options, error, words):
    with pytest.raises(error, match=words):
        m.ask(media, prompt, **options)


def test_a_window_without_content_is_an_error(m, clips):
    with pytest.raises((UsageError, MediaError), match="window|start"):
        m.ask(clips["sound"], "What?", start_s=99.0)
    with pytest.raises((UsageError, MediaError), match="start"):
        m.ask(clips["sound"], "What?", start_s=2.0, end_s=1.0)


def test_a_prompt_beyond_the_context_names_what_would_fit(clips):
    model, processor = tiny("llama", text={"max_position_embeddings": 200})
    m = AVLlava(model, processor, "small")
    with pytest.raises(
        BudgetError, match=r"context holds 200.*--frames (\d+).*--max-visual-tokens (\d+)"
    ) as caught:
        m.ask(clips["sound"], "What?", frames=40)
    import re

    frames, budget = map(
        int, re.search(r"--frames (\d+).*--max-visual-tokens (\d+)", str(caught.value)).groups()
    )
    assert (
        m.ask(clips["sound"], "What?", frames=frames, max_new_tokens=1).usage.video_tokens <= budget
    )
    with pytest.raises(BudgetError):
        m.ask(clips["sound"], "What?", frames=frames + 1, max_new_tokens=1)
    m.ask(clips["sound"], "What?", frames=40, max_visual_tokens=budget, max_new_tokens=1)


def test_the_answer_is_limited_to_the_context_with_a_message(clips, caplog):
    model, processor = tiny("llama", text={"max_position_embeddings": 64})
    answer = AVLlava(model, processor).ask(None, "Hi", max_new_tokens=500)
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens <= 64
    assert "limited" in caplog.text


def test_text_alone_and_stop_texts(m):
    free = m.ask(None, "Tell me", max_new_tokens=12)
    assert free.usage.prompt_tokens == free.usage.text_tokens
    stop = free.text[3:5]
    cut = m.ask(None, "Tell me", max_new_tokens=12, stop=[stop])
    assert cut.text == free.text[: free.text.index(stop)].strip() and cut.finish_reason == "stop"


def test_the_default_model_is_the_one_that_ships():
    m = av_llava.load(device="cpu")
    assert m.name == "av-llava-tiny" and not m.is_random
    assert av_llava.describe(None)["name"] == m.name
    assert m.ask(None, "Hi", max_new_tokens=1).model == m.name


def test_a_model_that_stands_in_for_a_missing_one_says_that_it_is_random(monkeypatch, tmp_path):
    monkeypatch.setattr("av_llava.demo_model.SHIPPED", tmp_path / "none")
    m = av_llava.load(device="cpu")
    assert m.is_random and "random" in m.name
    assert av_llava.describe(None)["name"] == m.name
    assert m.ask(None, "Hi", max_new_tokens=1).model == m.name


def test_the_time_instruction_is_llava_videos_text(m, clips):
    from av_llava.options import Options, conversation

    options = Options(frames=4, time_instruction=True)
    prepared, _ = m.prepare([conversation(clips["mute"], "What?", None)], options)
    assert (
        "<video>\nThe video lasts for 3.00 seconds, and 4 frames are uniformly sampled from it. "
        "These frames are located at 0.00s," in prepared.texts[0]
    )
    assert "related to this video.\nWhat?" in prepared.texts[0]


@pytest.fixture
def server(clips):
    """The clips by HTTP on this machine, and a log of what was asked for."""
    import http.server
    import threading as threads

    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(clips["sound"].parent))

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threads.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()
        thread.join()


def test_an_address_is_fetched_once_for_kind_frames_and_sound(m, clips, server):
    address, asked = server
    answer = m.ask(f"{address}/sound.mp4", "What?", max_new_tokens=2)
    assert asked == ["/sound.mp4"]
    alone = m.ask(clips["sound"], "What?", max_new_tokens=2)
    assert (answer.text, answer.usage) == (alone.text, alone.usage)
    assert answer.media[0].source == f"{address}/sound.mp4"
    muted = m.ask(clips["mute"], "What?", audio=f"{address}/sound.mp4", max_new_tokens=1)
    assert muted.media[0].audio_s == pytest.approx(3.0) and asked == ["/sound.mp4"] * 2


def test_a_missing_address_is_a_media_error(m, server):
    with pytest.raises(MediaError, match="nothing.mp4"):
        m.ask(f"{server[0]}/nothing.mp4", "What?")


def test_fetched_copies_are_removed(m, clips, server, tmp_path, monkeypatch):
    import gc
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    m.ask([f"{server[0]}/sound.mp4", clips["mute"].read_bytes()], "What?", max_new_tokens=1)
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_window_after_the_sound_has_frames_and_says_why_it_is_mute(m, tmp_path):
    clip = make_clip(
        tmp_path / "short.mp4", seconds=5, fps=10, size=(160, 120), audio="tone", audio_seconds=2
    )
    answer = m.ask(clip, "What?", start_s=3, end_s=5, max_new_tokens=1)
    assert (
        answer.media[0].audio_reason == "no sound in this window"
        and len(answer.media[0].pts_s) == 16
    )
    with pytest.raises(MediaError, match="no sound in this window"):
        m.ask(clip, "What?", start_s=3, end_s=5, audio="on")


def test_a_budget_leaves_what_fits_alone_and_counts_pictures(m, clips):
    free = m.ask(clips["sound"], "What?", max_new_tokens=1)
    assert (
        m.ask(clips["sound"], "What?", max_visual_tokens=10**6, max_new_tokens=1).usage
        == free.usage
    )
    picture = Image.new("RGB", (60, 60))
    both = m.ask(
        [picture, clips["sound"], clips["mute"]],
        "<image> <video> <video>?",
        max_visual_tokens=160,
        max_new_tokens=1,
    )
    assert 0 < both.usage.image_tokens + both.usage.video_tokens <= 160
    with pytest.raises(BudgetError, match="pictures of the prompt take 65 tokens"):
        m.ask(picture, "What?", max_visual_tokens=10)


def test_what_is_odd_about_the_sound_is_told(m, clips):
    assert m.ask(clips["silent"], "What?", max_new_tokens=1).warnings == (
        "the sound track is silent",
    )
    broken = np.full(16_000, np.nan, np.float32)
    assert "16000 samples" in m.ask(broken, "What?", max_new_tokens=1).warnings[0]
    long = m.ask(np.zeros(16_000 * 601, np.float32), "What?", max_new_tokens=1)
    assert long.media[0].audio_s == 600 and "600.0 s are used" in long.warnings[0]
    assert long.media[0].n_tokens == long.usage.audio_tokens


def test_options_without_effect_are_told(m):
    answer = m.ask(Image.new("RGB", (9, 9)), "What?", frames=3, start_s=1.0, max_new_tokens=1)
    assert len(answer.warnings) == 2 and "frames has no effect" in answer.warnings[0]


def test_pictures_as_arrays_and_content_parts(m, clips):
    array = np.zeros((20, 30, 3), np.uint8)
    a = m.ask(array, "What?", max_new_tokens=3)
    b = m.ask(Image.fromarray(array), "What?", max_new_tokens=3)
    assert a.text == b.text and a.usage == b.usage
    part = {"type": "video", "path": str(clips["mute"]), "frames": 3}
    assert len(m.ask(part, "What?", max_new_tokens=1).media[0].pts_s) == 3


def test_arrays_are_sampled_like_files(m):
    frames = np.zeros((40, 20, 20, 3), np.uint8)
    use = m.ask(
        frames, "What?", source_fps=10, frames=4, start_s=1.0, end_s=3.0, max_new_tokens=1
    ).media[0]
    assert len(use.pts_s) == 4 and min(use.pts_s) >= 1.0 and max(use.pts_s) < 3.0


def test_ask_many_without_media_and_one_stop_text(m):
    answers = m.ask_many(None, ["Hello", "Who?"], max_new_tokens=4)
    assert [a.text for a in answers] == [
        m.ask(None, q, max_new_tokens=4).text for q in ("Hello", "Who?")
    ]
    text = m.ask(None, "Tell me", max_new_tokens=12).text
    assert (
        m.ask(None, "Tell me", max_new_tokens=12, stop=text[4:6]).text
        == text[: text.index(text[4:6])].strip()
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.ask_many("x.mp4", "abc"), "one string"),
        (lambda m: m.ask_batch({"prompt": "a"}), "one mapping"),
        (lambda m: m.ask_batch([{"prompt": "a"}], batch_size=0), "batch_size must be at least 1"),
        (lambda m: m.ask(None, "Hi", frames=2.5), "frames must be a whole number"),
        (lambda m: m.ask(None, "Hi", temperature=float("nan")), "temperature must be a number"),
        (lambda m: m.ask(None, "Hi", seed="a"), "seed must be a whole number"),
        (lambda m: m.ask(np.zeros((2, 3), np.uint8), "Hi"), r"shape \[2, 3\] is no medium"),
        (lambda m: m.ask(Image.new("RGB", (9, 9)), "Hi", audio="on"), "there is no video"),
        (lambda m: av_llava.load(overwrite_config={"a": 1}), "goes with a path"),
        (lambda m: av_llava.load(attn_implementation="bogus"), "bogus"),
    ],
)
def test_wrong_calls_say_what_is_wrong(m, call, words):
    with pytest.raises(UsageError, match=words):
        call(m)


def test_frames_without_any_are_an_error(m):
    with pytest.raises(MediaError, match="holds none"):
        m.ask(np.zeros((0, 4, 4, 3), np.uint8), "Hi")
    with pytest.raises(MediaError, match="mute"):
        m.ask(np.zeros((2, 4, 4, 3), np.uint8), "Hi", audio="on")


def test_a_stream_runs_once_and_keeps_its_account_when_left(m):
    stream = m.stream(None, "Tell me", max_new_tokens=300)
    for _ in stream:
        break
    assert stream.answer.finish_reason == "interrupted"
    with pytest.raises(UsageError, match="streamed once"):
        list(stream)


def test_the_template_that_was_chosen_is_saved(m, tmp_path):
    model, processor = tiny("llama")
    own = AVLlava(model, processor)
    processor.chat_template = "vicuna_v1"
    own.save_pretrained(tmp_path)
    assert av_llava.load(tmp_path, device="cpu").processor.template.name == "vicuna_v1"


def test_llavas_own_folders_are_not_taken_for_ours(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava_llama", "hidden_size": 64}')
    from av_llava.modeling import AVLlavaForConditionalGeneration
    from av_llava.processor import AVLlavaProcessor

    for cls in (AVLlavaForConditionalGeneration, AVLlavaProcessor):
        with pytest.raises(av_llava.errors.CheckpointError, match=r"av_llava\.load"):
            cls.from_pretrained(tmp_path)
