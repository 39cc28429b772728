"""The model: three branches, every language model family, batches, gradients, saving, generation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny

from av_llava.chat import MediaPart, normalize_messages
from av_llava.errors import UsageError
from av_llava.modeling import AVLlavaForConditionalGeneration
from av_llava.planning import MediumRef, TextChunk
from av_llava.settings import AggregatorSettings, SequenceSettings

torch.set_num_threads(1)
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma"]
RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 255, (6, 40, 60, 3), dtype=np.uint8)
SOUND = (RNG.normal(size=40_000) * 0.1).astype(np.float32)


def prepare(processor, prompts, padding_side="left", sound=None, **options):
    """Batch of (media, prompt) pairs."""
    talks = []
    for media, prompt in prompts:
        parts = [MediaPart("video" if m.ndim == 4 else "audio", m) for m in media]
        talks.append(normalize_messages(prompt, parts))
    changes = {} if sound is None else {"audio": sound}
    return processor.prepare(
        talks, processor.media_options(**changes), padding_side=padding_side, **options
    )


def embed(model, prepared):
    return model.prepare_inputs(prepared.media, **prepared.tensors)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_batch_gives_the_logits_of_single_runs(kind):
    model, processor = tiny(kind)
    prompts = [([FRAMES], "What is it?"), ([], "Hello there, who are you?"), ([SOUND], "Hear this")]
    prompts.append(([FRAMES[:2], SOUND], "<audio> and then <video>, what?"))
    batch = prepare(processor, prompts)
    mask = batch.media.splice.attention_mask()
    with torch.no_grad():
        both = model(
            inputs_embeds=embed(model, batch),
            attention_mask=mask,
            position_ids=batch.media.splice.position_ids(),
        ).logits
        for i, prompt in enumerate(prompts):
            one = prepare(processor, [prompt])
            alone = model(inputs_embeds=embed(model, one)).logits[0]
            torch.testing.assert_close(both[i, mask[i].bool()], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("media", "branch"), [([], "none"), ([SOUND], "audio"), ([FRAMES], "vision")]
)
def test_only_the_encoders_of_the_branch_run(media, branch):
    model, processor = tiny()
    ran = []
    model.model.vision_tower.register_forward_hook(lambda *a: ran.append("vision"))
    model.model.audio_tower.register_forward_hook(lambda *a: ran.append("audio"))
    prepared = prepare(processor, [(media, "What?")])
    assert prepared.media.branch == branch
    embed(model, prepared)
    assert ran == ([] if branch == "none" else [branch])


def test_sound_changes_the_logits_and_its_place_does_too():
    results = []
    for placement, sound in [("block", None), ("block", SOUND), ("interleave", SOUND)]:
        model, processor = tiny(placement=placement)
        prepared = prepare(processor, [([FRAMES], "What?")], sound=sound)
        with torch.no_grad():
            results.append(model(inputs_embeds=embed(model, prepared)).logits[0, -1])
    assert not torch.allclose(results[0], results[1]) and not torch.allclose(results[1], results[2])


def test_interleaving_puts_each_frames_sound_after_it():
    model, processor = tiny(placement="interleave")
    prepared = prepare(processor, [([FRAMES], "What?")], sound=SOUND)
    (segments,) = prepared.media.splice.samples
    kinds = [s.kind for s in segments]
    assert kinds[0] == kinds[-1] == "text"
    # One frame a second and 2.5 s of sound: video, start, audio, video, audio, ..., end, video.
    start, end = model.config.au_token_ids
    ids = prepared.media.splice.text_ids.tolist()
    assert ids.count(start) == ids.count(end) == 1
    order = [k for k in kinds if k != "text"]
    assert order == ["video", "audio", "video", "audio", "video", "audio", "video"]
    plan = prepared.media.audios[0]
    rows = [s for s in segments if s.kind == "audio"]
    assert [plan.centres_s[s.lo] for s in rows] == sorted(plan.centres_s[s.lo] for s in rows)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_labels_follow_the_text_and_every_trainable_part_gets_a_gradient(kind):
    model, processor = tiny(kind)
    model.train()
    talk = normalize_messages(
        [
            {
                "role": "user",
                "content": [{"type": "video", "video": FRAMES}, {"type": "text", "text": "What?"}],
            },
            {"role": "assistant", "content": "A ball."},
        ]
    )
    prepared = processor.prepare(
        [talk],
        processor.media_options(audio=SOUND),
        supervised=True,
        add_generation_prompt=False,
        padding_side="right",
    )
    labels = prepared.media.splice.labels()
    answer = processor.tokenizer.decode(labels[0][labels[0] >= 0])
    assert answer.strip() == "A ball.<|im_end|>"
    out = model(media=prepared.media, **prepared.tensors)
    out.loss.backward()
    idle = {n for n, _ in model.model.vision_tower.idle_parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad and name.removeprefix("model.vision_tower.") not in idle:
            assert p.grad is not None, name


@pytest.mark.parametrize("media", [[], [FRAMES], [SOUND]])
def test_absent_branches_join_the_graph_in_training(media):
    model, processor = tiny()
    model.train()
    prepared = prepare(processor, [(media, "What?")], padding_side="right")
    model(inputs_embeds=embed(model, prepared)).logits.sum().backward()
    missing = [
        n
        for n, p in model.named_parameters()
        if p.requires_grad
        and p.grad is None
        and n.removeprefix("model.vision_tower.")
        not in {k for k, _ in model.model.vision_tower.idle_parameters()}
    ]
    assert missing == []


def test_frozen_towers_are_not_run_for_absent_media():
    model, processor = tiny()
    model.train()
    for part in ("vision_tower", "mm_projector", "audio_tower", "mm_audio_projector"):
        getattr(model.model, part).requires_grad_(False)
    ran = []
    model.model.vision_tower.register_forward_hook(lambda *a: ran.append(1))
    embed(model, prepare(processor, [([], "What?")]))
    assert ran == []


def test_generation_with_the_processors_output_returns_prompt_and_answer():
    model, processor = tiny("llama")
    messages = [
        {
            "role": "user",
            "content": [{"type": "video", "video": FRAMES}, {"type": "text", "text": "What?"}],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert (inputs["input_ids"] == -201).sum() == inputs["media"].videos[0].n_tokens
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    prompt = inputs["input_ids"].shape[1]
    assert out.shape == (1, prompt + 5) and (out >= 0).all()
    embeds = model.prepare_inputs(
        inputs["media"], pixel_values_videos=inputs["pixel_values_videos"]
    )
    alone = model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False)
    assert torch.equal(out[:, prompt:], alone)


def test_the_llava_door_equals_the_processor():
    model, processor = tiny("llama")
    prepared = prepare(processor, [([FRAMES, SOUND], "See <video> hear <audio> say")])
    ids = [[]]
    plan = prepared.media.splice
    start, end = model.config.au_token_ids
    for s in plan.samples[0]:
        if s.kind == "text":
            ids[0] += plan.text_ids[s.lo : s.hi].tolist()
        else:
            ids[0].append({"video": -200, "audio": -202}[s.kind])
    pixels = prepared.tensors["pixel_values_videos"].float() / 255
    pixels = (pixels - 0.5) / 0.5
    expected = embed(model, prepared)
    for given in (ids, [[t for t in ids[0] if t not in (start, end)]]):
        *_, embeds, _ = model.prepare_inputs_labels_for_multimodal(
            torch.tensor(given),
            None,
            None,
            None,
            None,
            [pixels],
            ["video"],
            audios=[torch.from_numpy(SOUND)],
        )
        torch.testing.assert_close(embeds, expected)


def test_audio_lengths_cut_the_padding_of_the_door():
    model, _ = tiny("llama")
    ids = torch.tensor([[5, -202, 6]])
    padded = torch.cat([torch.from_numpy(SOUND), torch.zeros(9000)])[None]
    *_, short, _ = model.prepare_inputs_labels_for_multimodal(
        ids, None, None, None, None, None, audios=padded, audio_lengths=[len(SOUND)]
    )
    *_, plain, _ = model.prepare_inputs_labels_for_multimodal(
        ids, None, None, None, None, None, audios=[torch.from_numpy(SOUND)]
    )
    assert torch.equal(short, plain)
    with pytest.raises(UsageError, match=r"audio_lengths\[0\] is 99999"):
        model.prepare_inputs_labels_for_multimodal(
            ids, None, None, None, None, None, audios=padded, audio_lengths=[99999]
        )


def test_the_door_leaves_text_and_decode_steps_alone():
    model, _ = tiny("llama")
    ids = torch.tensor([[1, 2, 3]])
    assert model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, None)[0] is ids
    one = torch.tensor([[7]])
    image = torch.zeros(1, 3, 56, 56)
    out = model.prepare_inputs_labels_for_multimodal(one, None, None, None, None, [image])
    assert out[0] is one and out[4] is None


@pytest.mark.parametrize(
    ("modalities", "message"),
    [(["image", "image"], "2 entries, but there are 1"), ("film", "Unknown modality 'film'")],
)
def test_the_door_checks_modalities(modalities, message):
    model, _ = tiny("llama")
    with pytest.raises(UsageError, match=message):
        model.prepare_inputs_labels_for_multimodal(
            torch.tensor([[1, -200]]),
            None,
            None,
            None,
            None,
            [torch.zeros(1, 3, 56, 56)],
            modalities,
        )


def test_text_only_samples_may_have_dummy_slots_or_none():
    model, _ = tiny("llama")
    ids = torch.tensor([[1, -200, 2], [3, 4, 5]])
    image, dummy = torch.randn(1, 3, 56, 56), torch.zeros(1, 3, 56, 56)
    results = []
    for images in ([image, dummy], [image]):
        *_, embeds, _ = model.prepare_inputs_labels_for_multimodal(
            ids,
            None,
            torch.ones_like(ids),
            None,
            None,
            images,
            image_sizes=[(56, 56)] * len(images),
        )
        results.append(embeds)
    assert torch.equal(*results)


def test_bfloat16_is_close_to_float32():
    model, processor = tiny("qwen2", text={"tie_word_embeddings": False})
    prepared = prepare(processor, [([FRAMES], "What?")], sound=SOUND)
    with torch.no_grad():
        full = embed(model, prepared)
        half = embed(model.bfloat16(), prepared)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.05, rtol=0.05)


def test_saving_writes_llava_names_and_loads_back_equal(tmp_path):
    from safetensors import safe_open

    import av_llava

    model, processor = tiny(
        "qwen2",
        aggregator=av_llava.aggregators.settings_of("llava_video_slowfast"),
        sequence=SequenceSettings(media_tokens=("frame_end", "newline"), template="qwen_1_5"),
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        names = set(f.keys())
    assert {
        "model.image_newline",
        "model.faster_token",
        "model.mm_projector.0.weight",
        "model.norm.weight",
    } <= names
    assert "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight" in names
    assert not any("language_model" in n or "media_tokens" in n for n in names)
    loaded = av_llava.load(tmp_path, device="cpu")
    prepared = prepare(processor, [([FRAMES], "What?")], sound=SOUND)
    again = prepare(loaded.processor, [([FRAMES], "What?")], sound=SOUND)
    with torch.no_grad():
        a = model(inputs_embeds=embed(model, prepared)).logits
        b = loaded.model(inputs_embeds=embed(loaded.model, again)).logits
    assert torch.equal(a, b)


def test_auto_classes_load_what_was_saved(tmp_path):
    from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

    import av_llava.auto  # noqa: F401

    model, processor = tiny("llama")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "av_llava"
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, AVLlavaForConditionalGeneration)
    state = loaded.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.config.to_dict() == processor.config.to_dict() | {
        k: again.config.to_dict()[k]
        for k in ("architectures", "dtype", "_name_or_path")
        if k in again.config.to_dict()
    }


def test_gradient_checkpointing_keeps_the_gradients():
    model, processor = tiny("llama")
    prepared = prepare(processor, [([FRAMES], "What?")], padding_side="right")

    def gradient():
        model.zero_grad()
        model(media=prepared.media, **prepared.tensors, use_cache=False).logits.float().pow(
            2
        ).mean().backward()
        return model.model.mm_projector[0].weight.grad.clone()

    model.train()
    plain = gradient()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(), plain)


def test_a_mark_that_the_model_lacks_is_refused_by_name():
    with pytest.raises(UsageError, match="frame_end"):
        tiny("llama", aggregator=AggregatorSettings(frame_end=True))


def test_media_without_an_encoder_are_refused():
    _, processor = tiny("llama", audio=False)
    with pytest.raises(UsageError, match="no audio tower"):
        prepare(processor, [([SOUND], "What?")])


def test_wrong_counts_name_the_medium():
    model, processor = tiny("llama")
    prepared = prepare(processor, [([FRAMES], "What?")])
    with pytest.raises(UsageError, match="pixel_values_videos was not given"):
        model.prepare_inputs(prepared.media)


def test_positions_can_be_laid_out_by_hand():
    model, _ = tiny("llama")
    planner = model.model.planner
    video = planner.video(3)
    media = planner.batch(
        [[TextChunk(np.array([1, 2])), MediumRef("video", 0), TextChunk(np.array([3]))]],
        videos=[video],
    )
    assert media.splice.lengths == (3 + video.n_tokens,)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(tmp_path, implementation):
    import av_llava

    model, processor = tiny("llama")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = av_llava.load(tmp_path, device="cpu", attn_implementation=implementation)
    assert loaded.model.model.language_model.config._attn_implementation == implementation
    prepared = prepare(processor, [([FRAMES], "What?")], sound=SOUND)
    with torch.no_grad():
        a = model(inputs_embeds=embed(model, prepared)).logits
        b = loaded.model(inputs_embeds=embed(loaded.model, prepared)).logits
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_rope_scaling_can_be_overridden():
    model, _ = tiny("llama", text={"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})
    assert model.model.language_model.rotary_emb.rope_type == "dynamic"


def test_learned_marks_of_sound_survive_saving(tmp_path):
    import av_llava

    model, processor = tiny("llama")
    config = model.config
    config.audio = config.audio.replace(chunk_newline=True, token_mode="param")
    config.au_token_ids = None
    torch.manual_seed(1)
    model = AVLlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = av_llava.load(tmp_path, device="cpu").model
    for name in ("audio_newline", "audio_begin", "audio_end"):
        mark = getattr(model.model.mm_audio_projector, name)
        assert torch.equal(mark, getattr(loaded.model.mm_audio_projector, name)) and mark.std() > 0
    prepared = prepare(processor, [([SOUND], "Hear")])
    assert prepared.media.audios[0].n_tokens == 13 + 1 + 2


@pytest.mark.parametrize("spec", ["llava_video", "pllava", "budget:40", "frame_newline"])
def test_long_videos_are_encoded_in_pieces_with_the_same_result(spec):
    model, processor = tiny("llama")
    batch = [([FRAMES, FRAMES[:3]], "<video> or <video>?"), ([FRAMES[1:]], "What?")]
    prepared = prepare(processor, batch, aggregator=spec)
    sizes = []
    model.model.vision_tower.register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    with torch.no_grad():
        whole = embed(model, prepared)
        model.config.vision = model.config.vision.replace(max_batch=4)
        pieces = embed(model, prepared)
    assert sizes == [14, 4, 2, 3, 4, 1]
    torch.testing.assert_close(whole, pieces, atol=1e-6, rtol=1e-5)
