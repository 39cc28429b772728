"""A tokenizer as metadata of a GGUF file: byte-level BPE, or SentencePiece's.

Contract: what is written comes from the tokenizer that this package itself would use, so the same
text gives the same ids there, except for what the sentences returned say. A tokenizer that
llama.cpp would read differently is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from av_llava.errors import CheckpointError

# llama.cpp's types of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"
_NEVER = -1e6  # score of a piece that no merge makes

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}": "qwen2",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
}
"""Regular expression that splits text before BPE to llama.cpp's name for it."""

_WHOLE_WORDS = ("llama-bpe",)  # llama.cpp takes a word that is a token without merging


@dataclass(frozen=True)
class Vocabulary:
    """Metadata for the file, and what it cannot express."""

    metadata: dict[str, Any]
    left_out: tuple[str, ...]


def plan_vocabulary(
    tokenizer: PreTrainedTokenizerBase, rows: int, end_tokens: Sequence[int] = ()
) -> Vocabulary:
    """Describe a tokenizer.

    Args:
        tokenizer: a fast one of transformers.
        rows: of the embedding matrix; the file has exactly so many tokens.
        end_tokens: ids that end an answer, the main one first; the tokenizer's own if empty.

    Raises:
        CheckpointError: llama.cpp has nothing that splits text as this tokenizer does.
    """
    data = _parts(tokenizer)
    tokens, types, notes = _tokens(tokenizer, data, rows)
    if data["model"].get("byte_fallback"):
        model, more = _sentencepiece(data, tokens, types)
    else:
        model, more = _byte_level(data)
    metadata = {
        **model,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **_special(tokenizer, end_tokens, rows),
    }
    return Vocabulary(metadata, (*notes, *more))


def _refused(why: str) -> CheckpointError:
    return CheckpointError(f"The tokenizer cannot be exported to GGUF: {why}.")


def _parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if not tokenizer.is_fast:
        raise _refused("it is not one of the tokenizers library (tokenizer.json)")
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = data["model"].get("type")
    if kind != "BPE":
        raise _refused(f"its model is {kind}, and only BPE is supported")
    return data


def _tokens(
    tokenizer: PreTrainedTokenizerBase, data: Mapping[str, Any], rows: int
) -> tuple[list[str], list[int], tuple[str, ...]]:
    """Text and type by id, filled up to the rows of the embedding matrix."""
    texts = [f"[PAD{i}]" for i in range(rows)]
    types = [_UNUSED] * rows
    whole = tokenizer.get_vocab()
    for text, index in whole.items():
        if index < rows:
            texts[index] = text
            types[index] = _BYTE if _BYTE_TOKEN.fullmatch(text) else _NORMAL
    unknown = data["model"].get("unk_token")
    for added in data["added_tokens"]:
        if added["id"] < rows:
            special = _UNKNOWN if added["content"] == unknown else _CONTROL
            types[added["id"]] = special if added["special"] else _USER_DEFINED
    if len(set(texts)) != rows:
        raise _refused("two ids have the same text")
    beyond = sorted(index for index in whole.values() if index >= rows)
    if not beyond:
        return texts, types, ()
    return (
        texts,
        types,
        (
            f"Tokens: {len(beyond)} tokens beyond the {rows} rows of the embedding matrix "
            f"(the first is {tokenizer.convert_ids_to_tokens(beyond[0])!r}) are left out.",
        ),
    )


def _special(
    tokenizer: PreTrainedTokenizerBase, end_tokens: Sequence[int], rows: int
) -> dict[str, Any]:
    ends = [i for i in [*end_tokens, tokenizer.eos_token_id] if i is not None]
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": ends[0] if ends else None,
        "eot": next((i for i in ends[1:] if i != ends[0]), None),
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    before, after = full[:at], full[at + len(bare) :]
    if before not in ([], [ids["bos"]]) or after not in ([], [ids["eos"]]):
        raise _refused(
            f"it puts the tokens {before} before a text and {after} after it, where llama.cpp "
            f"knows only the begin and the end token"
        )
    return {
        **{
            f"tokenizer.ggml.{name}_token_id": index
            for name, index in ids.items()
            if index is not None and index < rows
        },
        "tokenizer.ggml.add_bos_token": bool(before),
        "tokenizer.ggml.add_eos_token": bool(after),
    }


def _byte_level(data: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Byte-level BPE, as GPT-2, Qwen and Llama 3 have it."""
    name = _pre_tokenizer(data["pre_tokenizer"])
    if bool(data["model"].get("ignore_merges")) != (name in _WHOLE_WORDS):
        raise _refused(
            f"'ignore_merges' is {data['model'].get('ignore_merges')}, where llama.cpp assumes the "
            f"opposite for text that is split as in {name!r}"
        )
    merges = [" ".join(merge) for merge in _merges(data)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        # A list must not be empty; this merge can never happen.
        "tokenizer.ggml.merges": merges or ["\u0000 \u0000"],
    }
    normalizer = data["normalizer"]
    if normalizer is None:
        return metadata, ()
    if normalizer["type"] != "NFC":
        raise _refused(f"its normalizer is {normalizer['type']}, and llama.cpp has none")
    return metadata, (
        "Unicode: llama.cpp does not compose characters (NFC), so text that comes decomposed gives "
        "other tokens there.",
    )


def _merges(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs, however the tokenizers library wrote them."""
    for merge in data["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _pre_tokenizer(part: Mapping[str, Any] | None) -> str:
    """llama.cpp's name for the way in which text is split before BPE."""
    steps = [] if part is None else part.get("pretokenizers", [part])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise _refused(f"llama.cpp splits no text as its pre-tokenizer does: {part}")
    if len(steps) == 1 and steps[0]["use_regex"]:
        return "gpt-2"
    if len(steps) == 2 and steps[0]["type"] == "Split" and not steps[1]["use_regex"]:
        pattern = steps[0]["pattern"].get("Regex")
        plain = steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]
        if plain and pattern in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[pattern]
    raise _refused(f"llama.cpp splits no text as its pre-tokenizer does: {part}")


def _sentencepiece(
    data: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """SentencePiece's BPE, as Llama 1 and 2, Mistral and Yi have it."""
    scheme = _space_prefix(data)
    ranks: dict[str, int] = {}
    pairs = set()
    for rank, (left, right) in enumerate(_merges(data)):
        ranks.setdefault(left + right, rank)
        pairs.add((left, right))
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        # llama.cpp joins the pair whose whole has the highest score: the earliest merge.
        "tokenizer.ggml.scores": [-float(ranks[t]) if t in ranks else _NEVER for t in tokens],
        "tokenizer.ggml.add_space_prefix": scheme != "never",
    }
    notes = [_SPACES[scheme]] if scheme in _SPACES else []
    other = _other_joins(tokens, types, pairs)
    if other:
        notes.append(
            f"Merges: llama.cpp may join pieces that this tokenizer does not ({other[0]!r} and "
            f"{len(other) - 1} more), because it knows only their wholes."
        )
    return metadata, tuple(notes)


def _other_joins(
    tokens: Sequence[str], types: Sequence[int], pairs: set[tuple[str, str]]
) -> list[str]:
    """Tokens that llama.cpp could join from two tokens where the tokenizer has no such merge."""
    known = {t for t, kind in zip(tokens, types, strict=True) if kind == _NORMAL}
    return [
        token
        for token in sorted(known)
        if any(
            token[:i] in known and token[i:] in known and (token[:i], token[i:]) not in pairs
            for i in range(1, len(token))
        )
    ]


_SPACES = {
    "always": "Spaces: llama.cpp puts a space before a text that begins with one, too; this "
    "tokenizer does not.",
    "first": "Spaces: llama.cpp puts a space before the text after every special token, and before "
    "a text that begins with a space; this tokenizer does so only before the first text, unless it "
    "begins with a space.",
}


def _space_prefix(data: Mapping[str, Any]) -> str:
    """Before which texts a space goes: each, always (but no second one), first, or never."""
    steps = [s for s in (data["normalizer"], data["pre_tokenizer"]) if s is not None]
    flat = [inner for s in steps for inner in s.get("normalizers", [s])]
    scheme, replaces = "never", False
    for step in flat:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == _SPACE:
            scheme = "each"
        elif kind == "Replace" and step["content"] == _SPACE:
            replaces = step["pattern"].get("String") == " "
        elif kind == "Metaspace" and not step["split"] and step["replacement"] == _SPACE:
            scheme, replaces = step["prepend_scheme"], True
        else:
            raise _refused(f"llama.cpp's SentencePiece has no step like {step}")
    if not replaces:
        raise _refused("its spaces are not written as '▁'")
    return scheme
