"""Tokenizers as metadata of GGUF files."""

from __future__ import annotations

import json

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from av_llava.checkpoints.gguf_vocabulary import plan_vocabulary
from av_llava.demo_model import tiny_tokenizer
from av_llava.errors import CheckpointError

from .gguf_models import byte_level, sentencepiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def plan(tokenizer, rows=None, ends=()):
    found = plan_vocabulary(tokenizer, rows or len(tokenizer), ends)
    short = {k.removeprefix("tokenizer.ggml."): v for k, v in found.metadata.items()}
    return short, found.left_out


def test_byte_level_tokens_types_and_merges():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<plain>"])
    found, said = plan(tokenizer, len(tokenizer) + 3)
    assert found["model"] == "gpt2" and found["pre"] == "gpt-2" and not said
    tokens, types = found["tokens"], found["token_type"]
    for token, index in tokenizer.get_vocab().items():
        assert tokens[index] == token
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    assert {i for i, kind in enumerate(types) if kind == CONTROL} == special
    assert types[tokenizer.convert_tokens_to_ids("<plain>")] == USER_DEFINED
    assert types[-3:] == [UNUSED] * 3 and tokens[-1] == f"[PAD{len(tokens) - 1}]"
    assert len(set(tokens)) == len(tokens)
    merged = {merge.replace(" ", "", 1) for merge in found["merges"]}
    assert merged <= set(tokens)
    assert found["add_bos_token"] is False and found["add_eos_token"] is False
    assert "bos_token_id" not in found
    assert found["eos_token_id"] == tokenizer.eos_token_id
    assert found["padding_token_id"] == tokenizer.pad_token_id


@pytest.mark.parametrize("split", ["gpt-2", "qwen2", "llama-bpe"])
def test_the_way_of_splitting_is_recognised(split):
    found, said = plan(byte_level(split))
    assert found["pre"] == split
    assert found["add_bos_token"] is (split != "qwen2")
    assert any("NFC" in note for note in said) is (split == "qwen2")


def test_transformers_own_qwen_tokenizer_is_recognised():
    from transformers import Qwen2Tokenizer

    made = byte_level("qwen2")
    data = made.backend_tokenizer.model
    tokenizer = Qwen2Tokenizer(vocab=made.get_vocab(), merges=[])
    found, _ = plan(tokenizer)
    assert data is not None and found["pre"] == "qwen2"
    assert found["merges"]  # never an empty list, which the format cannot hold


def test_sentencepiece_scores_follow_the_merges():
    tokenizer = sentencepiece("each")
    found, said = plan(tokenizer)
    assert found["model"] == "llama" and found["add_space_prefix"] is True and not said
    tokens, types, scores = found["tokens"], found["token_type"], found["scores"]
    assert [types[i] for i in (0, 1, 2)] == [UNKNOWN, CONTROL, CONTROL]
    assert {t for t, kind in zip(tokens, types, strict=True) if kind == BYTE} == {
        f"<0x{i:02X}>" for i in range(256)
    }
    assert types[tokenizer.convert_tokens_to_ids("<au_start>")] == CONTROL
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    order = list(dict.fromkeys("".join(pair) for pair in merges))
    made = [t for t in order if t in tokens]
    ranked = sorted(made, key=lambda t: -scores[tokens.index(t)])
    assert ranked == made and len(made) > 50
    lowest = min(scores[tokens.index(t)] for t in made)
    assert all(scores[tokens.index(t)] < lowest for t in ("a", "<0x41>"))
    assert found["add_bos_token"] is True


@pytest.mark.parametrize(
    ("scheme", "prefix", "note"),
    [("always", True, "begins with one"), ("first", True, "every special"), ("never", False, None)],
)
def test_where_a_space_is_put(scheme, prefix, note):
    found, said = plan(sentencepiece(scheme))
    assert found["add_space_prefix"] is prefix
    assert len(said) == (note is not None) and (note is None or note in said[0])


def test_pieces_that_llama_cpp_could_join_otherwise_are_counted():
    vocab = {t: i for i, t in enumerate(["<unk>", "▁", "a", "b", "ab", "c", "abc", "bc"])}
    made = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[("a", "b"), ("b", "c"), ("ab", "c")],  # not ("a", "bc")
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    _, said = plan(tokenizer)
    assert len(said) == 1 and "'abc'" in said[0]


def test_end_tokens_of_the_model_win():
    tokenizer = tiny_tokenizer()
    found, _ = plan(tokenizer, ends=(7, 9))
    assert found["eos_token_id"] == 7 and found["eot_token_id"] == 9
    found, _ = plan(tokenizer, ends=(7,))
    assert found["eos_token_id"] == 7 and found["eot_token_id"] == tokenizer.eos_token_id
    found, _ = plan(tokenizer, ends=(tokenizer.eos_token_id,))
    assert "eot_token_id" not in found


def test_tokens_beyond_the_rows_are_left_out_and_counted():
    tokenizer = tiny_tokenizer()
    rows = len(tokenizer) - 4
    found, said = plan(tokenizer, rows)
    assert len(found["tokens"]) == rows
    assert said[0].startswith("Tokens: 4 tokens beyond")


def byte_bpe(**changes):
    made = Tokenizer(models.BPE(unk_token=None, **changes))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    return made


def with_pre(part):
    made = byte_bpe()
    made.pre_tokenizer = part
    return made


def with_normalizer(part):
    made = byte_bpe()
    made.normalizer = part
    return made


def unigram():
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return made


def sentence(pre):
    made = Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[], byte_fallback=True))
    made.pre_tokenizer = pre
    return made


def doubled():
    made = byte_bpe()
    made.post_processor = processors.TemplateProcessing(
        single="</s> </s> $A", special_tokens=[("</s>", 0)]
    )
    return made


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (unigram, "Unigram"),
        (lambda: with_pre(pre_tokenizers.Whitespace()), "Whitespace"),
        (lambda: with_pre(pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
        (lambda: byte_bpe(ignore_merges=True), "ignore_merges"),
        (lambda: with_normalizer(normalizers.Lowercase()), "Lowercase"),
        (lambda: sentence(pre_tokenizers.Metaspace(split=True)), "Metaspace"),
        (lambda: sentence(None), "spaces"),
        (
            lambda: with_pre(
                pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Split(Regex(r"\d{1,5}"), "isolated"),
                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                    ]
                )
            ),
            "1,5",
        ),
        (doubled, "begin and the end token"),
    ],
)
def test_tokenizers_that_llama_cpp_would_read_otherwise(make, words):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="</s>")
    with pytest.raises(CheckpointError, match=words):
        plan_vocabulary(tokenizer, 300)
