"""Loads a checkpoint's tokenizer and keeps it in step with the embedding matrix."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from av_llava.checkpoints.folder import CheckpointFolder
from av_llava.config import AVLlavaConfig
from av_llava.errors import CheckpointError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(folder: CheckpointFolder, config: AVLlavaConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if not any((folder.path / name).exists() for name in _FILES):
        raise CheckpointError(
            f"{folder.path} holds no tokenizer (expected one of {', '.join(_FILES)}). "
            f"Copy the tokenizer files of its language model there."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder.path), config=config.text_config, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"The tokenizer in {folder.path} cannot be read: {error}") from error
    if tokenizer.pad_token_id is None:
        # Padding is masked, so any token will do; the end token is in every vocabulary.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer
