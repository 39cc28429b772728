"""Modalities that code outside the package adds: one small class each.

Contract: a modality names its placeholder and its key in content parts, turns a source into a
tensor, says how many tokens that becomes, and builds the module that encodes and projects it.
Everything else (chat, planning, splice, saving) works for it as for images and sound. The idea is
multi_token's, with exact token counts instead of a fixed width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from av_llava.chat import MEDIA_IDS, MEDIA_TOKENS
from av_llava.errors import UsageError, unknown_name
from av_llava.settings import AUDIO_TOKEN_INDEX


class Modality(ABC):
    """One kind of medium.

    Subclasses set ``name``, which is also the ``type`` and the data key of its content parts
    (``{"type": "depth", "depth": source}``); its placeholder is ``<name>``.
    """

    name: str

    @property
    def token(self) -> str:
        """The placeholder in prompts."""
        return f"<{self.name}>"

    @abstractmethod
    def preprocess(self, source: Any) -> Tensor:
        """Open a source and make the tensor that the encoder takes, on the host."""

    @abstractmethod
    def n_tokens(self, item: Tensor) -> int:
        """Tokens that one preprocessed item becomes; exact."""

    @abstractmethod
    def build(self, width: int) -> nn.Module:
        """Make the module that encodes and projects: list of items to list of [n_tokens, width]."""


MODALITIES: dict[str, Modality] = {}
"""Registered modalities by name."""


def register(modality: Modality) -> None:
    """Add a modality; its placeholder id is the next negative number that is free.

    Raises:
        UsageError: the name is taken by another class.
    """
    taken = MODALITIES.get(modality.name)
    if modality.name in MEDIA_TOKENS and type(taken) is not type(modality):
        raise UsageError(f"The modality {modality.name!r} is registered already.")
    if taken is None:
        MEDIA_TOKENS[modality.name] = modality.token
        MEDIA_IDS[modality.token] = min(AUDIO_TOKEN_INDEX, *MEDIA_IDS.values()) - 1
    MODALITIES[modality.name] = modality


def token_id(name: str) -> int:
    """The placeholder id of a registered modality."""
    return MEDIA_IDS[get(name).token]


def get(name: str) -> Modality:
    """A registered modality.

    Raises:
        UsageError: it is not registered; a checkpoint that uses it needs the code that does so.
    """
    if name not in MODALITIES:
        raise unknown_name("modality (import the module that registers it)", name, MODALITIES)
    return MODALITIES[name]
