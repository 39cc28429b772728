"""Loads a checkpoint's tokenizer and keeps it in step with the embedding matrix."""

from __future__ import annotations

import importlib.util
import logging

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from av_llava.checkpoints.folder import CheckpointFolder, read_json, sentence
from av_llava.config import AVLlavaConfig
from av_llava.errors import CheckpointError, MissingExtraError

logger = logging.getLogger(__name__)

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_SHOWN_TOKENS = 5


def load_tokenizer(folder: CheckpointFolder, config: AVLlavaConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder.

    Tokens beyond the embedding matrix (some published folders have a few that no prompt uses) are
    warned about here and refused where a prompt holds one.

    Raises:
        CheckpointError: there is none, or it cannot be read, or has no token to pad with.
        MissingExtraError: it is a SentencePiece model, which needs two more packages.
    """
    if not any(folder.holds(name) for name in _FILES):
        raise CheckpointError(
            f"{folder.path} holds no tokenizer (expected one of {', '.join(_FILES)}). "
            f"Copy the tokenizer files of its language model there."
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if folder.holds(name):
            read_json(folder.path / name)
    if folder.holds("tokenizer.model") and not folder.holds("tokenizer.json"):
        _need_sentencepiece(folder)
    tokenizer = _read(folder, config)
    _warn_beyond(tokenizer, config)
    _ensure_padding(tokenizer, folder, config)
    return tokenizer


def _need_sentencepiece(folder: CheckpointFolder) -> None:
    """LLaVA-1.5's folders and their likes hold only SentencePiece's own file."""
    for package, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")):
        if not _is_installed(module):
            raise MissingExtraError(
                package, "sentencepiece", f"Reading {folder.path / 'tokenizer.model'}"
            )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that holds it
        return False


def _read(folder: CheckpointFolder, config: AVLlavaConfig) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(
            str(folder.path),
            config=config.text_config,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:
        # The tokenizers library raises Exception itself, no subclass, for a file it cannot read.
        known = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError)
        if type(error) is not Exception and not isinstance(error, known):
            raise
        why = sentence(str(error) or type(error).__name__)
        raise CheckpointError(f"The tokenizer in {folder.path} cannot be read: {why}") from error


def _warn_beyond(tokenizer: PreTrainedTokenizerBase, config: AVLlavaConfig) -> None:
    """Name the tokens that the embedding matrix has no row for."""
    rows = config.text_config.vocab_size
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if not beyond:
        return
    shown = ", ".join(f"{token!r} ({i})" for i, token in beyond[:_SHOWN_TOKENS])
    logger.warning(
        "The tokenizer has %d token(s) beyond the %d rows of the embedding matrix: %s%s. A prompt "
        "that holds one will be refused.",
        len(beyond),
        rows,
        shown,
        ", ..." if len(beyond) > _SHOWN_TOKENS else "",
    )


def _ensure_padding(
    tokenizer: PreTrainedTokenizerBase, folder: CheckpointFolder, config: AVLlavaConfig
) -> None:
    """Choose a token of the embedding matrix to pad with, if the tokenizer names none.

    Padding is masked, so any will do; but generation embeds it in rows that are finished.
    """
    rows = config.text_config.vocab_size
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < rows:
        return
    for token in (tokenizer.unk_token, tokenizer.eos_token):
        if token is not None and tokenizer.convert_tokens_to_ids(token) < rows:
            tokenizer.pad_token = token
            return
    raise CheckpointError(
        f"The tokenizer in {folder.path} names no token to pad with (pad_token, unk_token or "
        f"eos_token within the {rows} rows of the embedding matrix). Set pad_token in its "
        f"tokenizer_config.json."
    )
