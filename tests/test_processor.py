"""The processor as users of transformers and of LLaVA know it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clips import make_clip
from golden_data import golden
from PIL import Image
from tiny import tiny

import av_llava
from av_llava.chat import MediaPart, Message, TextPart
from av_llava.errors import MediaError, UsageError

torch.set_num_threads(1)
FRAMES = np.random.default_rng(0).integers(0, 255, (5, 40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def made():
    return tiny("llama")


def messages(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]


def test_a_batch_of_conversations(made):
    _, processor = made
    talks = [messages({"type": "video", "video": FRAMES}), messages()]
    inputs = processor.apply_chat_template(
        talks, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert (
        inputs["input_ids"].shape == inputs["attention_mask"].shape
        and len(inputs["input_ids"]) == 2
    )
    assert inputs["attention_mask"][1, 0] == 0  # padded on the left
    texts = processor.apply_chat_template(talks, add_generation_prompt=True)
    assert len(texts) == 2 and texts[0].count("<video>") == 1
    assert processor.apply_chat_template(talks[1], tokenize=True).shape[0] == 1


def test_a_batch_can_be_moved_and_cast(made):
    model, processor = made
    inputs = processor.apply_chat_template(
        messages({"type": "video", "video": FRAMES}),
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
    ).to("cpu", torch.bfloat16)
    assert inputs["pixel_values_videos"].dtype == torch.uint8
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_calling_it_with_rendered_text(made):
    _, processor = made
    inputs = processor(
        text=["<video>\nWhat?", "Hello"], videos=[FRAMES], padding=True, return_tensors="pt"
    )
    assert inputs["media"].videos[0].frames == 5
    with pytest.raises(UsageError, match="more <video> placeholders"):
        processor(text="<video><video>", videos=[FRAMES])
    with pytest.raises(UsageError, match="More media than placeholders"):
        processor(text="Hello", videos=[FRAMES])
    with pytest.raises(UsageError, match="'pt'"):
        processor(text="Hello", return_tensors="np")


def test_another_template_for_one_call(made):
    _, processor = made
    text = processor.apply_chat_template(messages(), "vicuna_v1", add_generation_prompt=True)
    assert text.endswith("USER: What? ASSISTANT:")


def test_unknown_media_options_are_named(made):
    _, processor = made
    with pytest.raises(UsageError, match="Did you mean 'frames'"):
        processor.apply_chat_template(messages(), tokenize=True, framez=3)


def test_llavas_users_find_their_functions():
    tokenizer, model, processor, context = av_llava.load_pretrained_model(
        golden("llava/v16_anyres_unpad_batch4") / "checkpoint", device="cpu"
    )
    images = [Image.new("RGB", (100, 60), "red"), Image.new("RGB", (40, 90), "blue")]
    tiles = av_llava.process_images(images, processor, model.config)
    assert processor.crop_size == {"height": 56, "width": 56}
    assert len(processor.image_mean) == len(processor.image_std) == 3 and context == 2048
    prompt = "<image> or <image>?"
    ids = av_llava.tokenizer_image_token(
        prompt, tokenizer, av_llava.IMAGE_TOKEN_INDEX, return_tensors="pt"
    )
    new = model.generate(
        ids[None],
        images=tiles,
        image_sizes=[i.size for i in images],
        max_new_tokens=3,
        do_sample=False,
    )
    assert new.shape == (1, 3)


def test_a_part_says_which_sound_goes_with_its_video(made, tmp_path):
    _, processor = made
    clip = str(make_clip(tmp_path / "clip.mp4", seconds=2))
    sound = str(make_clip(tmp_path / "sound.wav", seconds=1, video=False))
    mute = str(make_clip(tmp_path / "mute.mp4", seconds=2, audio=None))

    def used(video, own, asked="auto"):
        part = MediaPart("video", video, audio=own)
        options = processor.media_options(frames=2, audio=asked)
        talk = [Message("user", (part, TextPart("\nWhat?")))]
        prepared = [processor.prepare([talk], options, decode=d) for d in (True, False)]
        assert prepared[0].media.splice.lengths == prepared[1].media.splice.lengths
        return prepared[0].used[0][0]

    assert used(clip, None).audio_s == used(clip, "on").audio_s == pytest.approx(2, abs=0.1)
    assert used(clip, "off").audio_s == 0
    assert used(mute, sound).audio_s == pytest.approx(1, abs=0.1)
    assert used(mute, sound).audio_source == sound
    assert used(clip, None, "off").audio_s == used(mute, sound, "off").audio_s == 0
    assert used(mute, "auto", "on").audio_s == 0
    with pytest.raises(MediaError, match="no sound track"):
        used(mute, "on")
    with pytest.raises(MediaError, match=r"there-is-none\.wav"):
        used(mute, str(tmp_path / "there-is-none.wav"))
