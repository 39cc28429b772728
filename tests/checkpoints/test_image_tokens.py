"""LLaVA's image tokens: added where the configuration says so, with the rows that they should have."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from golden_data import golden
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

import av_llava
from av_llava.checkpoints.load import load_checkpoint
from av_llava.checkpoints.merge import merge_adapter
from av_llava.checkpoints.partial import load_partial
from av_llava.checkpoints.tokens import IMAGE_TOKENS, PATCH_TOKEN
from av_llava.errors import CheckpointError

from .folders import ABSENT, V15, copy_case, edit_config, edit_weights, read_weights

torch.set_num_threads(1)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PICTURE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def ids_of(loaded):
    return loaded.tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))


def tables(loaded):
    model = loaded.model
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def logits(model, n=300):
    with torch.no_grad():
        return model(input_ids=torch.arange(20, n, 7)[None]).logits


N = 304  # tokens of the reference's tokenizer, whose matrix has a few rows more


@pytest.fixture
def folder(tmp_path):
    """A checkpoint whose matrix is as long as its tokenizer."""
    made = copy_case(V15, tmp_path)
    state = read_weights(made)
    edit_weights(made, **{k: state[k][:N].clone() for k in (EMBED, HEAD)})
    edit_config(made, vocab_size=N)
    return made


def load(folder, **options):
    return load_checkpoint(folder, device="cpu", dtype="float32", **options)


def test_the_case_fills_its_matrix(folder):
    """What the other tests rely on."""
    assert len(AutoTokenizer.from_pretrained(folder)) == len(read_weights(folder)[EMBED]) == 304


def test_tokens_get_mean_rows_and_nothing_else_changes(folder):
    before = load(folder)
    edit_config(folder, mm_use_im_start_end=True)
    loaded = load(folder)
    assert ids_of(loaded) == [304, 305]
    for table, old in zip(tables(loaded), tables(before), strict=True):
        assert table.shape == (306, 64) and torch.equal(table[:304], old)
        for i in (304, 305):
            torch.testing.assert_close(table[i], old.mean(0), atol=1e-7, rtol=1e-6)
    assert loaded.model.config.text_config.vocab_size == 306
    assert torch.equal(logits(loaded.model)[..., :304], logits(before.model))


def test_the_patch_token_comes_first_and_only_when_the_config_says_so(folder):
    edit_config(folder, mm_use_im_patch_token=True, mm_use_im_start_end=True)
    loaded = load(folder)
    assert loaded.tokenizer.convert_tokens_to_ids(PATCH_TOKEN) == 304
    assert ids_of(loaded) == [305, 306] and len(tables(loaded)[0]) == 307
    edit_config(folder, mm_use_im_patch_token=ABSENT, mm_use_im_start_end=ABSENT)
    loaded = load(folder)
    assert len(loaded.tokenizer) == len(tables(loaded)[0]) == 304


def test_rows_that_the_checkpoint_has_are_its_own(folder):
    """Trained rows, of which the tokenizer's files do not know."""
    state = read_weights(folder)
    rows = torch.randn(2, 64)
    edit_weights(folder, **{k: torch.cat([state[k], rows]) for k in (EMBED, HEAD)})
    edit_config(folder, mm_use_im_start_end=True, vocab_size=306)
    loaded = load(folder)
    assert ids_of(loaded) == [304, 305]
    for table in tables(loaded):
        assert table.shape == (306, 64) and torch.equal(table[304:], rows)


def test_a_padded_matrix_is_never_shrunk(folder):
    state = read_weights(folder)
    edit_weights(folder, **{k: torch.cat([state[k], torch.randn(80, 64)]) for k in (EMBED, HEAD)})
    edit_config(folder, mm_use_im_start_end=True, vocab_size=384)
    loaded = load(folder)
    assert ids_of(loaded) == [304, 305] and len(tables(loaded)[0]) == 384
    assert torch.equal(tables(loaded)[0], read_weights(folder)[EMBED])


def test_a_tied_head_grows_with_the_embedding(folder):
    edit_weights(folder, **{HEAD: ABSENT})
    edit_config(folder, mm_use_im_start_end=True, tie_word_embeddings=True)
    loaded = load(folder)
    embedding, head = tables(loaded)
    assert head is embedding and head.shape == (306, 64)


def test_prompts_wrap_pictures_and_plans_count_the_tokens(folder, tmp_path):
    edit_config(folder, mm_use_im_start_end=True)
    m = av_llava.load(folder, device="cpu")
    answer = m.ask(PICTURE, "What is it?", max_new_tokens=2)
    planned = av_llava.plan(folder, PICTURE, "What is it?")
    assert planned.usage.prompt_tokens == answer.usage.prompt_tokens
    edit_config(folder, mm_use_im_start_end=False)
    bare = av_llava.plan(folder, PICTURE, "What is it?")
    assert planned.usage.text_tokens == bare.usage.text_tokens + 2
    m.save_pretrained(tmp_path / "saved")
    again = av_llava.load(tmp_path / "saved", device="cpu")
    assert again.ask(PICTURE, "What is it?", max_new_tokens=2).text == answer.text
    assert len(again.model.get_input_embeddings().weight) == 306


def test_an_offloaded_embedding_cannot_grow(folder):
    edit_config(folder, mm_use_im_start_end=True)
    parts = ("vision_tower", "mm_projector", "media_tokens", "modalities")
    place = {f"model.{part}": "cpu" for part in parts}
    place |= {"model.language_model": "disk", "lm_head": "disk"}
    with pytest.raises(CheckpointError, match="offloaded"):
        load_checkpoint(folder, device="cpu", device_map=place)


# ---------------------------------------------------------------- on a base


@pytest.fixture
def case(tmp_path):
    """A projector that was aligned with start and end tokens, on a language model."""
    shutil.copytree(golden("llava/layout_mm_projector_only"), tmp_path / "case")
    edit_config(tmp_path / "case" / "checkpoint", mm_use_im_start_end=True, vocab_size=N)
    resize_base(tmp_path / "case", N)
    return tmp_path / "case"


def resize_base(case, n):
    model = LlamaForCausalLM.from_pretrained(case / "base")
    model.resize_token_embeddings(n, mean_resizing=False)
    model.save_pretrained(case / "base")


def with_embeddings(case, table):
    file = case / "checkpoint" / "mm_projector.bin"
    state = torch.load(file, weights_only=True)
    torch.save({**state, EMBED: table}, file)


def base_table(case, name=EMBED):
    return load_file(case / "base" / "model.safetensors")[name]


def test_only_the_two_rows_of_the_first_stage_are_taken(case):
    rows = torch.randn(2, 64)
    whole = torch.cat([torch.randn(304, 64), rows])
    for table in (rows, whole):  # as the first stage saves them; its second takes only the two
        with_embeddings(case, table)
        loaded = load_partial(case / "checkpoint", case / "base", device="cpu")
        embedding, head = tables(loaded)
        assert ids_of(loaded) == [304, 305]
        assert torch.equal(embedding[304:], rows)
        assert torch.equal(embedding[:304], base_table(case))
        mean = base_table(case, HEAD).mean(0)
        torch.testing.assert_close(head[304:], mean.expand(2, 64), atol=1e-7, rtol=1e-6)


def test_without_rows_the_tokens_begin_as_the_mean_and_merging_agrees(case, tmp_path):
    loaded = load_partial(case / "checkpoint", case / "base", device="cpu")
    mean = base_table(case).mean(0)
    torch.testing.assert_close(tables(loaded)[0][305], mean, atol=1e-7, rtol=1e-6)
    merge_adapter(case / "checkpoint", case / "base", tmp_path / "whole")
    whole = load_checkpoint(tmp_path / "whole", device="cpu")
    for ours, theirs in zip(tables(whole), tables(loaded), strict=True):
        assert torch.equal(ours, theirs)
    with_embeddings(case, torch.randn(2, 64))
    merge_adapter(case / "checkpoint", case / "base", tmp_path / "trained")
    loaded = load_partial(case / "checkpoint", case / "base", device="cpu")
    trained = load_checkpoint(tmp_path / "trained", device="cpu")
    assert torch.equal(tables(trained)[0], tables(loaded)[0])


@pytest.mark.parametrize("n_file", [2, 306, 384])
def test_spare_rows_of_a_padded_base_are_used(case, n_file, tmp_path):
    resize_base(case, 384)
    table = torch.randn(n_file, 64)
    with_embeddings(case, table)
    loaded = load_partial(case / "checkpoint", case / "base", device="cpu")
    embedding, head = tables(loaded)
    assert len(embedding) == 384
    wanted = table[304:306] if n_file == 384 else table[-2:]
    assert torch.equal(embedding[304:306], wanted)
    mean = base_table(case, HEAD)[:304].mean(0)
    torch.testing.assert_close(head[304:306], mean.expand(2, 64), atol=1e-7, rtol=1e-6)
    assert torch.equal(embedding[306:], base_table(case)[306:])
    merge_adapter(case / "checkpoint", case / "base", tmp_path / "whole")
    whole = load_checkpoint(tmp_path / "whole", device="cpu")
    assert torch.equal(tables(whole)[1], head) and torch.equal(tables(whole)[0], embedding)


def test_a_base_that_knows_the_tokens_keeps_their_rows(case):
    tokenizer = AutoTokenizer.from_pretrained(case / "base")
    tokenizer.add_tokens(list(IMAGE_TOKENS), special_tokens=True)
    tokenizer.save_pretrained(case / "base")
    resize_base(case, 306)
    loaded = load_partial(case / "checkpoint", case / "base", device="cpu")
    assert torch.equal(tables(loaded)[0], base_table(case))


def test_a_whole_matrix_beside_a_lora_is_taken_as_it_is(case):
    """``non_lora_trainables`` is loaded over the model as a whole, also by LLaVA."""
    folder = case / "checkpoint"
    projector = torch.load(folder / "mm_projector.bin", weights_only=True)
    (folder / "mm_projector.bin").unlink()
    table = torch.randn(306, 64)
    torch.save(
        {f"base_model.model.{k}": v for k, v in {**projector, EMBED: table}.items()},
        folder / "non_lora_trainables.bin",
    )
    loaded = load_partial(folder, case / "base", device="cpu")
    assert torch.equal(tables(loaded)[0], table) and len(tables(loaded)[1]) == 306


@pytest.mark.parametrize(
    ("shape", "words"),
    [((3, 64), r"\(3, 64\).*\(2, 64\).*\(306, 64\)"), ((2, 32), r"\(2, 32\).*\(2, 64\)")],
)
def test_embeddings_of_other_shapes_are_named(case, shape, words):
    with_embeddings(case, torch.zeros(shape))
    with pytest.raises(CheckpointError, match=words):
        load_partial(case / "checkpoint", case / "base", device="cpu")


def test_embeddings_without_tokens_are_refused(case):
    with_embeddings(case, torch.zeros(2, 64))
    edit_config(case / "checkpoint", mm_use_im_start_end=False)
    with pytest.raises(CheckpointError, match="mm_use_im_start_end"):
        load_partial(case / "checkpoint", case / "base", device="cpu")


def test_asking_on_a_base_with_tokens(case):
    m = av_llava.load(case / "checkpoint", device="cpu", base=case / "base")
    talk = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, "What?"]}]
    text = m.processor.apply_chat_template(talk, tokenize=False)
    assert "<im_start><image><im_end>" in text
    assert m.ask(PICTURE, "What?", max_new_tokens=1).usage.image_tokens > 0
