"""What data are refused for before anything is trained on them.

Contract: a row that is wrong in itself ends the run, and so does a part that trains but that no
sample would use. A medium that cannot be read is left to :mod:`av_llava.training.bad_media`.
"""

from __future__ import annotations

from typing import Any

from av_llava.errors import AVLlavaError, BudgetError, DataError, MediaError
from av_llava.training.index import MODALITY_BITS, LengthIndex, Measurer
from av_llava.training.parts import PartsTable


def check_rows(measurer: Measurer, index: LengthIndex) -> None:
    """Refuse rows that are wrong themselves; media that cannot be read are another matter.

    Args:
        measurer: of the samples.
        index: what it found.

    Raises:
        DataError: a row cannot be read, does not fit the template, or nothing of it is learned.
    """
    store = measurer.store
    for row in sorted(index.errors):
        sample = store[row]  # raises for a row that is malformed
        try:
            measurer.length(sample)
        except (MediaError, BudgetError, OSError):
            continue
        except AVLlavaError as error:
            raise DataError(f"{store.where(row)}: sample {sample.id!r}: {error}") from error


def check_modalities(table: PartsTable, index: LengthIndex) -> None:
    """Refuse to train an encoder or projector on data that never uses it.

    Raises:
        DataError: nothing in the data would train a part, or no sample can be used at all.
    """
    usable = index.usable
    if len(index) and not usable.any():
        raise DataError(f"None of the {len(index)} samples can be used. {_look(index, usable)}")
    seen = int(_or(index.modality[usable]))
    wanted = {
        "vision_tower": MODALITY_BITS["image"] | MODALITY_BITS["video"],
        "mm_projector": MODALITY_BITS["image"] | MODALITY_BITS["video"],
        "audio_tower": MODALITY_BITS["audio"],
        "mm_audio_projector": MODALITY_BITS["audio"],
    }
    for name, bits in wanted.items():
        if table.of(name).n_trained and not seen & bits:
            what = "sound" if bits == MODALITY_BITS["audio"] else "pictures or videos"
            declared = usable | (index.modality & bits == 0)
            if not declared.all():
                raise DataError(
                    f"{int((~declared).sum())} of the {len(index)} samples cannot be used, and no "
                    f"other has {what}, which trainable.{name} needs. {_look(index, declared)}"
                )
            raise DataError(
                f"trainable.{name} trains, but none of the {len(index)} samples has {what} that "
                f"is used. Freeze it (trainable.{name}=freeze), or add such samples."
            )


def _look(index: LengthIndex, fine: Any) -> str:
    """The first reason among the rows that are not fine, and where to look."""
    first = int((~fine).argmax())
    return (
        f"The first: {index.errors[first]} Look at the paths of the data and at data.media_root; "
        "av-llava data validate --decode names every such row."
    )


def _or(codes: Any) -> int:
    found = 0
    for code in set(codes.tolist()):
        found |= code
    return found
