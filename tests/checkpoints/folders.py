"""Makes checkpoint folders to load and to break, from the compact reference cases."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import golden
from safetensors.torch import load_file, save_file

from av_llava.checkpoints.load import Loaded, load_checkpoint
from av_llava.errors import CheckpointError

torch.set_num_threads(1)
V15, V16 = "v15_flat_batch3_right", "v16_anyres_unpad_batch4"
OV, LV = "ov70_single_small", "sf_odd_stride3_average"
ABSENT = object()  # as a value: take the key out


def copy_case(name: str, to: Path) -> Path:
    """Copy a case's checkpoint and the tower beside it; return the checkpoint."""
    source = golden(f"llava/{name}")
    for part in source.iterdir():
        if part.is_dir():
            shutil.copytree(part, to / part.name)
    return to / "checkpoint"


def edit_json(file: Path, **changes: Any) -> dict[str, Any]:
    data = json.loads(file.read_text()) | changes
    data = {k: v for k, v in data.items() if v is not ABSENT}
    file.write_text(json.dumps(data))
    return data


def edit_config(folder: Path, **changes: Any) -> dict[str, Any]:
    return edit_json(folder / "config.json", **changes)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def write_weights(folder: Path, state: dict[str, torch.Tensor], kind="safetensors", shards=1):
    """Replace a folder's weights, in one file or in shards with an index."""
    for old in [*folder.glob("*.safetensors*"), *folder.glob("pytorch_model*")]:
        old.unlink()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    names = sorted(state)
    parts = [{n: state[n].clone() for n in names[i::shards]} for i in range(shards)]
    where = {}
    for i, part in enumerate(parts):
        file = f"{stem}.{kind}" if shards == 1 else f"{stem}-{i + 1:05}-of-{shards:05}.{kind}"
        if kind == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": where}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))


def write_sentencepiece(folder: Path, symbols: tuple[str, ...] = (), **settings: Any) -> Any:
    """Replace a folder's tokenizer by one of SentencePiece, as LLaVA publishes; return its model.

    Args:
        folder: of the checkpoint.
        symbols: tokens that are taken whole.
        settings: changes to ``tokenizer_config.json``.
    """
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    for old in folder.glob("*token*"):
        old.unlink()
    text = folder.parent / "text.txt"
    text.write_text(
        "What is in this image?\nA red ball moves to the left.\nUSER: ASSISTANT:\n" * 20
    )
    spm.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300 + len(symbols),
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        user_defined_symbols=list(symbols),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    usual = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(usual | settings))
    return spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def edit_weights(folder: Path, **changes: Any) -> None:
    """Add, replace or (with ABSENT) remove tensors."""
    state = {**read_weights(folder), **changes}
    write_weights(folder, {k: v for k, v in state.items() if v is not ABSENT})


def load(folder: Path, **options: Any) -> Loaded:
    return load_checkpoint(folder, **{"device": "cpu", "dtype": "float32", **options})


def refusal(folder: Path, **options: Any) -> str:
    """Load what must be refused; return the message, which always names a file or folder."""
    with pytest.raises(CheckpointError) as caught:
        load(folder, **options)
    message = str(caught.value)
    assert caught.value.exit_code == 4 and message.endswith((".", ")", "]")), message
    return message


def same_weights(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Take all permissions from a path, also for root, who heeds none."""
    mode = path.stat().st_mode
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        path.chmod(mode)


@pytest.fixture
def public_path() -> Iterator[Path]:
    """An empty folder that every user may enter, unlike pytest's own."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)
