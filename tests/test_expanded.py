"""Expanded ids without a plan: what takes which row, what is refused, and equality with a plan."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny

from av_llava.errors import UsageError
from av_llava.expanded import ExpandedInputs, open_expanded, plan_from_expanded
from av_llava.settings import IGNORE_INDEX, ImageSettings
from av_llava.splice import splice

torch.set_num_threads(1)

IDS = {"image": 7, "video": -201, "audio": -202}
WIDTH = 4
RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 255, (6, 40, 60, 3), dtype=np.uint8)
SOUND = (RNG.normal(size=40_000) * 0.1).astype(np.float32)


class Planner:
    """A planner whose media take as many rows as they are told to."""

    config = SimpleNamespace(media_token_ids=IDS)
    aggregator = None

    @staticmethod
    def image(size, n_tiles):
        return SimpleNamespace(n_tokens=n_tiles, size=size)

    @staticmethod
    def video(n_frames):
        return SimpleNamespace(n_tokens=n_frames)

    audio = video


def plan(ids, mask=None, labels=None, **media):
    rows = [torch.tensor(t) if t is not None else None for t in (ids, mask, labels)]
    return plan_from_expanded(Planner(), *rows, **media)


def embedding():
    torch.manual_seed(0)
    return torch.nn.Embedding(20, WIDTH)


def scattered(embed, ids, features):
    """The slow way of transformers: embed everything, then overwrite each kind's rows in order."""
    out = embed(ids.where(ids >= 0, 0))
    for kind, media_id in IDS.items():
        if kind in features:
            mask = (ids == media_id)[..., None]
            out = out.masked_scatter(mask, torch.cat(features[kind]))
    return out


@st.composite
def batches(draw):
    """Rows of text and media pieces; pieces of different kinds mix, items of one kind do not."""
    n_rows = draw(st.integers(1, 3))
    media = {kind: [] for kind in IDS}
    rows = []
    for _ in range(n_rows):
        pieces = []
        for kind, media_id in IDS.items():
            counts = draw(st.lists(st.integers(1, 5), max_size=3))
            media[kind] += counts
            pieces += [media_id] * sum(counts)
        pieces += [draw(st.integers(8, 19)) for _ in range(draw(st.integers(0, 6)))]
        rows.append(draw(st.permutations(pieces)))
    length = max(1, *map(len, rows)) + draw(st.integers(0, 2))
    masks = []
    for i, row in enumerate(rows):
        left = draw(st.integers(0, length - len(row)))
        right = length - len(row) - left
        masks.append([0] * left + [1] * len(row) + [0] * right)
        rows[i] = [1] * left + list(row) + [1] * right
    return torch.tensor(rows), torch.tensor(masks), media


@given(batches())
def test_rows_are_those_of_masked_scatter(batch):
    ids, mask, media = batch
    labels = torch.where(mask == 1, ids, IGNORE_INDEX)
    generator = torch.Generator().manual_seed(1)
    features = {
        kind: [torch.randn((n, WIDTH), generator=generator) for n in counts]
        for kind, counts in media.items()
        if counts
    }
    made = plan_from_expanded(
        Planner(),
        ids,
        mask,
        labels,
        images=[(n, None) for n in media["image"]],
        videos=media["video"],
        audios=media["audio"],
    )
    embed = embedding()
    got = splice(embed, made.splice, features)
    assert torch.equal(got, scattered(embed, ids, features))
    assert made.splice.shape == tuple(ids.shape)
    assert torch.equal(made.splice.attention_mask(), mask)
    is_text = (ids >= 8) | (ids == 1)
    wanted = torch.where(is_text, labels, IGNORE_INDEX)
    assert torch.equal(made.splice.labels(), wanted)
    positions = made.splice.position_ids()
    for row, kept in zip(positions, mask.bool(), strict=True):
        assert row[kept].tolist() == list(range(int(kept.sum()))) and not row[~kept].any()


def test_a_medium_may_lie_in_pieces():
    made = plan([[9, 7, 7, -202, 7, 9, 7, 7]], images=[(4, None), (1, None)], audios=[1])
    (segments,) = made.splice.samples
    spoken = [s for s in segments if s.kind != "text"]
    assert [(s.kind, s.item, s.lo, s.hi) for s in spoken] == [
        ("image", 0, 0, 2),
        ("audio", 0, 0, 1),
        ("image", 0, 2, 3),
        ("image", 0, 3, 4),
        ("image", 1, 0, 1),
    ]
    assert made.splice.text_ids.tolist() == [9, 9]


def test_without_a_mask_everything_is_content():
    made = plan([[9, 7], [9, 9]], images=[(1, None)])
    assert made.splice.attention_mask().tolist() == [[1, 1], [1, 1]]
    assert made.splice.labels() is None


def test_the_mask_behind_a_cache_is_longer():
    made = plan([[9, 7]], mask=[[1, 1, 1, 0, 1]], images=[(1, None)])
    assert made.splice.attention_mask().tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("ids", "media", "words"),
    [
        (
            [[9, 7, 7]],
            {"images": [(3, None)]},
            "image 0 is planned with 3 tokens, but sample 0 has 2 ",
        ),
        (
            [[7, 7, 7, 9], [7, 7, 9, 9]],
            {"images": [(2, None), (3, None)]},
            r"image 1 is planned with 3 tokens, but sample 0 has 1 rows of image ids \(7\) left for "
            "it; of 3 found there, media before it take 2",
        ),
        (
            [[7, 7, 9]],
            {"images": [(2, None), (3, None)]},
            r"image 1 is planned with 3 tokens, but no rows of image ids \(7\) are left for it: 2 were "
            r"found in the batch, and 5 are planned for 2 image\(s\)",
        ),
        (
            [[9, -201], [-201, -201]],
            {"videos": [1]},
            r"Sample 1 has 2 rows of video ids \(-201\) for which no video was given: 3 were found in "
            r"the batch, and 1 are planned for 1 video\(s\)",
        ),
        ([[9, -202]], {}, "Sample 0 has 1 rows of audio ids"),
        ([[9, -202, 9]], {"audios": [50]}, "LLaVA's way: give the pixels as images="),
        ([[-202] * 40], {"audios": [50]}, "Ids that were cut"),
        ([[9, 9], [9, -200]], {}, "Sample 1 holds the id -200 at position 1"),
    ],
)
def test_rows_that_do_not_match_are_an_error(ids, media, words):
    with pytest.raises(UsageError, match=words):
        plan(ids, **media)


@pytest.mark.parametrize(
    ("mask", "labels", "words"),
    [
        ([[1]], None, r"attention_mask has shape \[1, 1\], but input_ids has \[1, 2\]"),
        (None, [[1, 2, 3]], r"labels has shape \[1, 3\]"),
    ],
)
def test_shapes_must_agree(mask, labels, words):
    with pytest.raises(UsageError, match=words):
        plan([[9, 9]], mask, labels)
    with pytest.raises(UsageError, match=r"\[batch, length\], not \[1\]"):
        plan([9])


def test_the_padding_cannot_be_changed():
    made = plan([[9, 7]], images=[(1, None)]).splice
    with pytest.raises(UsageError, match="padding that they came with"):
        made.with_padding("right")
    with pytest.raises(UsageError, match="length that they came with"):
        made.truncated(1)


def test_other_modalities_take_rows_too():
    planner = Planner()
    planner.config = SimpleNamespace(media_token_ids={**IDS, "depth": -203})
    made = plan_from_expanded(
        planner, torch.tensor([[9, -203, -203, 9, -203]]), extras={"depth": [2, 1]}
    )
    assert made.splice.counts == {"depth": (2, 1)}
    assert [s.kind for s in made.splice.samples[0]] == ["text", "depth", "text", "depth"]


# ---------------------------------------------------------------- tiles, frames, chunks

ANYRES = ImageSettings(
    aspect_ratio="anyres",
    patch_merge_type="spatial_unpad",
    grid_pinpoints=((56, 112), (112, 56), (112, 112)),
)
TALL, WIDE = (90, 40), (40, 90)  # (height, width): one column or one row of two tiles


@pytest.fixture(scope="module")
def anyres():
    model, processor = tiny("llama", image=ANYRES)
    return model, processor


def pixels(*shape):
    return torch.randn(*shape, 3, 56, 56, generator=torch.Generator().manual_seed(3))


def opened(model, ids, **inputs):
    return open_expanded(model.model.planner, ids, None, None, ExpandedInputs(**inputs))


def ids_for(model, *plans, media_id=-200):
    rows = [5]
    for made in plans:
        rows += [media_id] * made.n_tokens + [6]
    return torch.tensor([rows])


def test_height_comes_before_width(anyres):
    model, _ = anyres
    tall = model.model.planner.image((40, 90), 3)
    media, tensors = opened(
        model, ids_for(model, tall), pixel_values=pixels(1, 3), image_sizes=torch.tensor([TALL])
    )
    assert media.images == (tall,) and tall.tiles == (2, 1)
    assert tensors["pixel_values"].shape == (3, 3, 56, 56)


def test_padded_tiles_are_left_out(anyres):
    model, _ = anyres
    planner = model.model.planner
    plans = [planner.image((40, 90), 3), planner.image((90, 90), 5)]
    tiles = pixels(2, 5)
    batch = {"pixel_values": tiles, "image_sizes": [TALL, (90, 90)]}
    media, tensors = opened(model, ids_for(model, *plans), **batch)
    assert [p.n_tiles for p in media.images] == [3, 5]
    assert torch.equal(tensors["pixel_values"], torch.cat([tiles[0, :3], tiles[1]]))
    listed = [tiles[0, :3], tiles[1]]
    for same in (listed, torch.cat(listed)):
        again, given_ = opened(
            model, ids_for(model, *plans), pixel_values=same, image_sizes=batch["image_sizes"]
        )
        assert again.images == media.images
        joined = given_["pixel_values"]
        joined = torch.cat(joined) if isinstance(joined, list) else joined
        assert torch.equal(joined, tensors["pixel_values"])


def test_several_images_of_a_prompt_are_one_view_each(anyres):
    model, _ = anyres
    planner = model.model.planner
    one, three = planner.image(None, 1), planner.image((40, 90), 3)
    ids = ids_for(model, one, one, three)
    batch = {"pixel_values": pixels(3, 3), "image_sizes": [WIDE, WIDE, TALL]}
    media, _ = opened(model, ids, **batch, batch_num_images=torch.tensor([2, 1]))
    assert media.images == (one, one, three)
    with pytest.raises(UsageError, match="batch_num_images matters"):
        opened(model, ids, **batch)
    with pytest.raises(UsageError, match="batch_num_images counts 2 images, but there are 3"):
        opened(model, ids, **batch, batch_num_images=[1, 1])


@pytest.mark.parametrize(
    ("shape", "sizes", "words"),
    [
        ((1, 4), [TALL], r"1 image\(s\) of up to 4 tiles, but by image_sizes they are 1 of \[3\]"),
        ((2, 3), [TALL], r"2 image\(s\) of up to 3 tiles, but by image_sizes they are 1 of \[3\]"),
        ((1, 3), None, "width and height"),
        ((7,), [TALL, WIDE], r"holds 7 tiles, but by image_sizes there are \[3, 3\]"),
        ((1, 1, 1), None, r"pixel_values must be .*not \[1, 1, 1, 3, 56, 56\]"),
    ],
)
def test_tiles_that_do_not_fit_are_an_error(anyres, shape, sizes, words):
    model, _ = anyres
    with pytest.raises(UsageError, match=words):
        opened(model, torch.tensor([[5]]), pixel_values=pixels(*shape), image_sizes=sizes)


def test_sizes_of_a_list_must_be_as_many(anyres):
    model, _ = anyres
    with pytest.raises(UsageError, match="image_sizes has 2 entries for 1 images"):
        opened(model, torch.tensor([[5]]), pixel_values=[pixels()], image_sizes=[TALL, WIDE])


def test_videos_come_as_one_tensor_or_several(anyres):
    model, _ = anyres
    planner = model.model.planner
    frames = pixels(2, 3)
    two = ids_for(model, planner.video(3), planner.video(3), media_id=-201)
    whole, tensors = opened(model, two, pixel_values_videos=frames)
    listed, _ = opened(model, two, pixel_values_videos=list(frames))
    assert whole.videos == listed.videos and tensors["pixel_values_videos"].ndim == 4
    single = ids_for(model, planner.video(3), media_id=-201)
    assert opened(model, single, pixel_values_videos=frames[0])[0].videos == whole.videos[:1]
    with pytest.raises(UsageError, match="pixel_values_videos must be"):
        opened(model, single, pixel_values_videos=frames[0, 0])


def test_sound_needs_its_length(anyres):
    model, _ = anyres
    sound = model.model.planner.audio(40_000)
    ids = ids_for(model, sound, media_id=-202)
    features = torch.zeros(1, 80, 3000)
    media, _ = opened(model, ids, input_features=features, audio_lengths=torch.tensor([40_000]))
    assert media.audios == (sound,)
    with pytest.raises(UsageError, match="input_features needs audio_lengths"):
        opened(model, ids, input_features=features)
    with pytest.raises(UsageError, match=r"2 chunk\(s\), but clips of \[40000\] samples"):
        opened(model, ids, input_features=features.repeat(2, 1, 1), audio_lengths=[40_000])


# ---------------------------------------------------------------- the model


def talk(*parts, question="What?"):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def made_by_the_processor(processor, conversations, **options):
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, add_generation_prompt=True, **options
    )


PICTURE = {"type": "image", "image": Image.fromarray(FRAMES[0])}
CONVERSATIONS = {
    "image": [talk(PICTURE), talk()],
    "images": [talk(PICTURE, PICTURE)],
    "video": [talk({"type": "video", "video": FRAMES}), talk(question="Who are you then?")],
    "sound": [
        talk({"type": "audio", "audio": SOUND}),
        talk({"type": "audio", "audio": SOUND[:9000]}),
    ],
    "everything": [
        talk({"type": "audio", "audio": SOUND}, PICTURE, {"type": "video", "video": FRAMES}),
        talk(PICTURE, question="And this one?"),
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("placement", ["block", "interleave"])
def test_the_plan_can_be_left_out(name, placement):
    model, processor = tiny("llama", placement=placement)
    own_sound = {"audio": SOUND} if name in ("video", "everything") else {}
    inputs = made_by_the_processor(processor, CONVERSATIONS[name], **own_sound)
    media = inputs["media"]
    without = {k: v for k, v in inputs.items() if k != "media"}
    sizes = [FRAMES[0].shape[:2]] * len(media.images)
    extra = {"image_sizes": sizes} if sizes else {}
    if media.audios:
        extra["audio_lengths"] = [p.n_samples for p in media.audios]
    frames = [p.frames for p in media.videos]
    if frames:
        extra["pixel_values_videos"] = list(inputs["pixel_values_videos"].split(frames))
    keep = inputs["attention_mask"].bool()
    assert not keep.all() or len(keep) == 1
    with torch.no_grad():
        planned = model(**inputs).logits[keep]
        torch.testing.assert_close(model(**{**without, **extra}).logits[keep], planned)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    answers = [
        model.generate(**inputs, **options),
        model.generate(**{**without, **extra}, **options),
    ]
    assert torch.equal(*answers) and (answers[0] >= 0).all()
    assert answers[0].shape[1] == keep.shape[1] + 4


def expanded_sample(model, n_frames=3):
    made = model.model.planner.video(n_frames)
    ids = torch.tensor([[5, 6, *[-201] * made.n_tokens, 8, 9, 10]])
    return ids, pixels(1, n_frames)


def test_labels_on_media_rows_are_ignored():
    model, _ = tiny("llama")
    ids, frames = expanded_sample(model)
    labels = ids.clone()  # what a collator does that masks only padding
    out = model(ids, pixel_values_videos=frames, labels=labels)
    masked = model(ids, pixel_values_videos=frames, labels=labels.where(ids >= 0, IGNORE_INDEX))
    assert torch.equal(out.loss, masked.loss) and out.loss.isfinite()
    out.loss.backward()
    assert model.model.mm_projector[0].weight.grad.abs().sum() > 0


def test_ids_stay_ids_in_the_vocabulary():
    model, _ = tiny("llama")
    ids, frames = expanded_sample(model)
    model.config.video_token_id = 3
    prompt = ids.where(ids >= 0, 3)
    out = model.generate(
        prompt, pixel_values_videos=frames, max_new_tokens=2, do_sample=False, eos_token_id=None
    )
    assert torch.equal(out[:, :-2], prompt)
    model.config.video_token_id = -201
    negative = model.generate(
        ids, pixel_values_videos=frames, max_new_tokens=2, do_sample=False, eos_token_id=None
    )
    assert torch.equal(negative[:, -2:], out[:, -2:])


def test_a_second_turn_may_bring_media_behind_a_cache():
    model, _ = tiny("llama")
    ids, frames = expanded_sample(model)
    first, second = torch.tensor([[11, 12, 13]]), ids
    mask = torch.ones(1, first.shape[1] + second.shape[1], dtype=torch.int64)
    with torch.no_grad():
        whole = model(torch.cat([first, second], 1), pixel_values_videos=frames).logits
        cache = model(first, use_cache=True).past_key_values
        turn = model(
            second, attention_mask=mask, past_key_values=cache, pixel_values_videos=frames
        ).logits
    torch.testing.assert_close(turn, whole[:, first.shape[1] :], atol=1e-5, rtol=1e-4)


def test_the_headless_model_wants_a_plan():
    model, _ = tiny("llama")
    ids, frames = expanded_sample(model)
    with pytest.raises(UsageError, match=r"without a plan \(media\)"):
        model.model(ids, pixel_values_videos=frames)


def test_media_that_no_id_asks_for_are_refused():
    model, _ = tiny("llama")
    _, frames = expanded_sample(model)
    with pytest.raises(UsageError, match="video 0 is planned with .* no rows of video ids"):
        model(torch.tensor([[5, 6]]), pixel_values_videos=frames)


def test_a_processor_of_vocabulary_ids_reads_placeholders():
    model, processor = tiny("llama")
    processor.config.image_token_id = 3
    inputs = processor("<image> What?", images=[Image.fromarray(FRAMES[0])])
    n = inputs["media"].images[0].n_tokens
    assert (inputs["input_ids"] == 3).sum() == n and (inputs["input_ids"] >= 0).all()
    without = {k: v for k, v in inputs.items() if k != "media"}
    with torch.no_grad():
        logits = model(**without).logits
        torch.testing.assert_close(logits, model(**inputs).logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_ids_are_copied_from_the_device_once():
    model, _ = tiny("llama")
    model.cuda()
    ids, frames = expanded_sample(model)
    ids, frames, mask = ids.cuda(), frames.cuda(), torch.ones_like(ids).cuda()
    planner, inputs = model.model.planner, ExpandedInputs(pixel_values_videos=frames)
    open_expanded(planner, ids, mask, ids, inputs)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            media, tensors = open_expanded(planner, ids, mask, ids, inputs)
            model.prepare_inputs(media, **tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in seen if "synchroniz" in str(w.message)]) == 1


def test_ids_may_have_any_integer_type():
    made = plan_from_expanded(
        Planner(), torch.tensor([[9, 7]], dtype=torch.int32), images=[(1, None)]
    )
    assert made.splice.text_ids.dtype == np.int64
