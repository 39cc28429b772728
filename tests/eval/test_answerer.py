"""The model behind the harness: answers equal those of asking singly, in every arm."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from clips import make_clip
from eval_stand_in import write_toy
from PIL import Image
from tiny import tiny

import av_llava
from av_llava.demo_model import tiny_random
from av_llava.errors import BudgetError, MediaError
from av_llava.inference import AVLlava
from av_llava.media import Limits
from av_llava.media.worker import close_workers
from av_llava_eval.annotations import read_rows
from av_llava_eval.answerer import AVLlavaAnswerer, Clip, MediaSettings
from av_llava_eval.experiment import Arm, Donors, arms_of
from av_llava_eval.failures import MissingFileError, NoSoundError, kind_of
from av_llava_eval.fingerprint import weights_hash
from av_llava_eval.records import RunFolder
from av_llava_eval.runner import RunSettings, run
from av_llava_eval.sample import Sample
from av_llava_eval.task import Task

torch.set_num_threads(1)
QUESTIONS = ["What rings?", "How many red balls are there, and when do they move?", "Where?"]
FRAMES, NEW = 4, 6


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    make_clip(folder / "a.mp4", seconds=3)
    make_clip(folder / "b.mp4", seconds=2, audio=np.sin(np.arange(80_000) / 7) * 0.3)
    make_clip(folder / "mute.mp4", seconds=2, audio=None)
    make_clip(folder / "tone.wav", seconds=2, video=False)
    (folder / "broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:200])
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def model():
    yield AVLlava(*tiny("qwen2", placement="interleave"))
    close_workers()


def nobody() -> Iterable[Clip]:
    return ()


def ask(model, clip, arm, settings=None, lenders=nobody, questions=QUESTIONS):
    answerer = AVLlavaAnswerer(model, settings or MediaSettings(frames=FRAMES))
    opened = answerer.open(clip, [arm], lenders)
    return answerer.answer(opened, arm, questions, NEW)


def singly(model, media, **options):
    return [model.ask(media, q, max_new_tokens=NEW, **options) for q in QUESTIONS]


@pytest.mark.parametrize(
    ("arm", "options"),
    [
        (Arm("on", sound="on"), {"audio": "on"}),
        (Arm("off", sound="off"), {"audio": "off"}),
        (Arm("auto"), {}),
        (Arm("slow", aggregator="llava_video"), {"aggregator": "llava_video"}),
        (Arm("small", max_visual_tokens=40), {"max_visual_tokens": 40}),
    ],
)
def test_a_video_is_encoded_once_and_answers_equal_those_of_asking_singly(
    films, model, arm, options
):
    ran = []
    hook = model.model.model.vision_tower.register_forward_hook(lambda *a: ran.append(1))
    replies = ask(model, Clip("a", films / "a.mp4"), arm)
    hook.remove()
    assert len(ran) == 1
    alone = singly(model, films / "a.mp4", frames=FRAMES, **options)
    assert [r.text for r in replies] == [a.text for a in alone]
    for reply, answer in zip(replies, alone):
        used = reply.used
        assert used["frames"] == FRAMES == len(used["frame_times_s"])
        assert used["visual_tokens"] == answer.usage.video_tokens
        assert used["audio_tokens"] == answer.usage.audio_tokens
        assert used["text_tokens"] == answer.usage.text_tokens
        assert used["no_audio"] == answer.media[0].audio_reason
        assert used["new_tokens"] == answer.usage.completion_tokens
        assert set(reply.timing_s) == {"decode", "encode", "generate"}


def test_windows_and_a_separate_sound(films, model):
    clip = Clip("a", films / "a.mp4", films / "tone.wav", start_s=0.5, end_s=1.5)
    replies = ask(model, clip, Arm("main", sound="on"))
    window = {"start_s": 0.5, "end_s": 1.5, "frames": FRAMES, "audio": str(films / "tone.wav")}
    assert [r.text for r in replies] == [a.text for a in singly(model, films / "a.mp4", **window)]
    times = replies[0].used["frame_times_s"]
    assert 0.5 <= times[0] <= times[-1] < 1.5 and replies[0].used["audio_s"] == pytest.approx(1)


def test_swapped_sound_is_the_sound_of_another_video(films, model):
    clips = [Clip("gone", films / "gone.mp4"), Clip("mute", films / "mute.mp4")]
    clips += [Clip("b", films / "b.mp4"), Clip("tone", audio=films / "tone.wav")]
    arm = Arm("swap", sound="swap")
    swapped = ask(model, Clip("a", films / "a.mp4"), arm, lenders=lambda: clips)
    assert [r.used["audio_of"] for r in swapped] == ["b"] * 3
    alone = singly(model, films / "a.mp4", frames=FRAMES, audio=str(films / "b.mp4"))
    assert [r.text for r in swapped] == [a.text for a in alone]
    with pytest.raises(NoSoundError, match="No other video has sound"):
        ask(model, Clip("a", films / "a.mp4"), arm, lenders=lambda: clips[:2])


def test_blind_and_deaf(films, model):
    heard = ask(model, Clip("a", films / "a.mp4"), Arm("audio only", sees=False, sound="on"))
    assert heard[0].used["visual_tokens"] == 0 and heard[0].used["audio_s"] == pytest.approx(3.0)
    sound_alone = singly(model, films / "tone.wav")
    only = ask(
        model, Clip("t", audio=films / "tone.wav"), Arm("audio only", sees=False, sound="on")
    )
    assert [r.text for r in only] == [a.text for a in sound_alone]
    text = ask(model, Clip("a", films / "gone.mp4"), Arm("text only", sees=False, sound="off"))
    assert [r.text for r in text] == [a.text for a in singly(model, None)]
    assert text[0].used["frames"] == text[0].used["audio_tokens"] == 0


def test_pictures_with_sound(films, model):
    clip = Clip("p", audio=films / "tone.wav", images=(films / "photo.png",))
    replies = ask(model, clip, Arm("main"))
    both = [str(films / "photo.png"), str(films / "tone.wav")]
    assert [r.text for r in replies] == [a.text for a in singly(model, both)]


def test_a_folder_of_pictures_has_the_rate_of_the_annotations(films, model, tmp_path):
    for i in range(6):
        Image.fromarray(np.full((40, 60, 3), 40 * i, np.uint8)).save(tmp_path / f"{i:03}.jpg")
    replies = ask(model, Clip("f", tmp_path, source_fps=3.0), Arm("main"))
    assert replies[0].used["frame_times_s"][-1] == pytest.approx(5 / 3, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "arm", "kind"),
    [
        ("gone.mp4", Arm("main"), "missing"),
        ("broken.mp4", Arm("main"), "decode"),
        ("mute.mp4", Arm("on", sound="on"), "no_audio"),
        ("gone.mp4", Arm("audio only", sees=False, sound="on"), "missing"),
    ],
)
def test_what_is_wrong_with_a_file_has_a_kind(films, model, name, arm, kind):
    with pytest.raises(MediaError) as caught:
        ask(model, Clip("x", films / name), arm)
    assert kind_of(caught.value) == kind and name in str(caught.value)


def test_what_one_arm_cannot_read_does_not_harm_the_others(films, model):
    answerer = AVLlavaAnswerer(model, MediaSettings(frames=FRAMES))
    arms = arms_of(audio=("on", "off"), text_only=True)
    opened = answerer.open(Clip("m", films / "mute.mp4"), arms, nobody)
    with pytest.raises(NoSoundError):
        answerer.answer(opened, arms[0], QUESTIONS, NEW)
    assert len(answerer.answer(opened, arms[1], QUESTIONS, NEW)) == 3
    gone = answerer.open(Clip("g", films / "gone.mp4"), arms, nobody)
    with pytest.raises(MissingFileError):
        answerer.answer(gone, arms[1], QUESTIONS, NEW)
    assert len(answerer.answer(gone, arms[2], QUESTIONS, NEW)) == 3


@pytest.mark.parametrize(
    ("limits", "kind", "said"),
    [
        ({"max_decode_s": 0.001}, "timeout", "took longer than|did not finish within"),
        ({"max_worker_bytes": 1_000_000}, "decode", "memory|allocate|crashed"),
    ],
)
def test_time_and_memory_of_decoding_are_limited(films, model, limits, kind, said):
    settings = MediaSettings(frames=FRAMES, limits=Limits(**limits))
    with pytest.raises(MediaError, match=said) as caught:
        ask(model, Clip("a", films / "a.mp4"), Arm("main", sound="off"), settings)
    assert kind_of(caught.value) == kind


def test_an_exhausted_memory_halves_the_batch(films, model, monkeypatch):
    sizes = []
    real = type(model.session(np.zeros((1, 8, 8, 3), np.uint8))).ask_many

    def greedy(self, prompts, **changes):
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, prompts, **changes)

    monkeypatch.setattr("av_llava.sessions.Session.ask_many", greedy)
    replies = ask(model, Clip("a", films / "a.mp4"), Arm("main"))
    assert len(replies) == 3 and sizes == [3, 1, 1, 1]


def test_a_question_beyond_the_context_is_its_own_failure(films):
    small = AVLlava(*tiny("qwen2", text={"max_position_embeddings": 300}))
    with pytest.raises(BudgetError) as caught:
        ask(small, Clip("a", films / "a.mp4"), Arm("main"), questions=["Why? " * 200])
    assert kind_of(caught.value) == "context"


# -------------------------------------------------------------------- identity


def test_the_fingerprint_sees_one_changed_weight_and_nothing_else():
    first, same, other = (AVLlava(*tiny("qwen2", seed=s)) for s in (0, 0, 1))
    prints = [AVLlavaAnswerer(m).fingerprint() for m in (first, same, other)]
    assert prints[0] == prints[1] != prints[2]
    weight = first.model.get_input_embeddings().weight
    with torch.no_grad():
        weight[17, 3] += 1e-4
    assert weights_hash(first.model) != weights_hash(same.model)
    assert AVLlavaAnswerer(same, MediaSettings(frames=3)).fingerprint() != prints[1]
    half = AVLlava(*tiny("qwen2", seed=0))
    half.model.to(torch.bfloat16)
    assert weights_hash(half.model) != weights_hash(same.model)


@pytest.mark.parametrize("scheme", ["int8", "8bit"])
def test_a_quantised_model_is_another_one(tmp_path, scheme):
    pytest.importorskip("torchao" if scheme == "int8" else "bitsandbytes")
    folder = tiny_random(tmp_path / "model")
    hashes = [
        weights_hash(av_llava.load(folder, device="cpu", quantize=q).model)
        for q in (None, scheme, scheme)
    ]
    assert hashes[0] != hashes[1] == hashes[2]


def test_the_arms_of_an_experiment():
    names = [a.name for a in arms_of(audio=("on", "off", "swap"), text_only=True, audio_only=True)]
    assert names == ["audio on", "audio off", "audio swap", "audio only", "text only"]
    assert [a.name for a in arms_of()] == ["main"]
    grid = arms_of(audio=("on", "off"), aggregators=("own", "llava_video"))
    assert [(a.name, a.aggregator) for a in grid] == [
        ("audio on, own", None),
        ("audio on, llava_video", "llava_video"),
        ("audio off, own", None),
        ("audio off, llava_video", "llava_video"),
    ]
    assert [a.name for a in arms_of(max_visual_tokens=(64, 128))] == ["64 tokens", "128 tokens"]
    for wrong in (
        {"audio": ("loud",)},
        {"audio": ("on", "on")},
        {"aggregators": ("nonsense",)},
        {"max_visual_tokens": (0,)},
        {"aggregators": ("own",), "max_visual_tokens": (9,)},
    ):
        with pytest.raises(av_llava.errors.UsageError):
            arms_of(**wrong)


def test_nobody_gets_their_own_sound():
    groups = [f"v{i}" for i in range(7)]
    donors = Donors(groups)
    for group in groups:
        tried = list(donors.of(group))
        assert group not in tried and sorted([*tried, group]) == groups
    first = [next(iter(donors.of(g))) for g in groups]
    assert sorted(first) == groups
    with pytest.raises(av_llava.errors.UsageError):
        Donors(["alone"])


# -------------------------------------------------------------------- the whole way


class Films(Task):
    name = "films"
    groupings = ("video",)

    def docs(self, root, split):
        return read_rows(root / "toy.json")

    def sample(self, doc, index, root):
        return Sample(
            id=doc["id"],
            group=doc["video"],
            question=doc["question"],
            answer="yes",
            video=root / doc["video"],
            meta={"video": doc["video"]},
        )


def rows():
    films = ("a.mp4", "b.mp4", "mute.mp4", "gone.mp4", "broken.mp4")
    return [
        {"id": f"{film}-{i}", "video": film, "question": f"{question}"}
        for film in films
        for i, question in enumerate(QUESTIONS)
    ]


def test_an_experiment_from_files_to_answers(films, model, tmp_path):
    data = write_toy(tmp_path / "data", rows())
    for film in films.glob("*.mp4"):
        (data / film.name).write_bytes(film.read_bytes())
    arms = arms_of(audio=("on", "off", "swap"), text_only=True)
    answerer = AVLlavaAnswerer(model, MediaSettings(frames=FRAMES))
    settings = RunSettings(arms=arms, max_new_tokens=NEW)
    done = run(Films(), data, tmp_path / "run", lambda: answerer, settings)
    assert done.complete
    found = RunFolder(tmp_path / "run").answers()
    status = {
        (arm, film): {found[arm, f"{film}-{i}"]["status"] for i in range(3)}
        for arm in ("audio on", "audio off", "audio swap", "text only")
        for film in ("a.mp4", "mute.mp4", "gone.mp4", "broken.mp4")
    }
    assert status["audio on", "a.mp4"] == status["audio off", "mute.mp4"] == {"ok"}
    assert status["audio swap", "mute.mp4"] == status["text only", "gone.mp4"] == {"ok"}
    assert status["audio on", "mute.mp4"] == {"no_audio"}
    assert status["audio on", "gone.mp4"] == {"missing"}
    assert status["audio off", "broken.mp4"] == {"decode"}
    alone = model.ask(
        data / "a.mp4",
        Films().prompt(next(Films().load(data))),
        frames=FRAMES,
        audio="on",
        max_new_tokens=NEW,
    )
    assert found["audio on", "a.mp4-0"]["raw"] == alone.text
