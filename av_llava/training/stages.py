"""The stages of a recipe, each starting from the result of the one before.

Contract: a stage is an ordinary run in its own folder below the recipe's output. What has finished
is not run again when the recipe is resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from av_llava.errors import UsageError
from av_llava.training import recipe
from av_llava.training.run_folder import RunFolder
from av_llava.training.settings import TrainSettings


def runs_of(settings: TrainSettings, stage: str | None = None) -> Iterator[TrainSettings]:
    """The settings of each run that a recipe asks for, in order.

    Args:
        settings: of the recipe.
        stage: only this stage.

    Raises:
        UsageError: no such stage, or no output folder.
    """
    if not settings.stages:
        if stage is not None:
            raise UsageError(f"The recipe has no stages, so it has no stage {stage!r}.")
        yield settings
        return
    if not settings.output:
        raise UsageError("The recipe names no output: add output=... to the command.")
    if stage is not None:
        recipe.stage_settings(settings, stage)  # raises for an unknown one
    before: Path | None = None
    for one in settings.stages:
        own = recipe.stage_settings(settings, one.name)
        own = _placed(own, Path(settings.output) / one.name, before, one.changes.get("model"))
        if stage is None or stage == one.name:
            yield own
        before = RunFolder(own.output or "").final


def _placed(
    settings: TrainSettings, output: Path, before: Path | None, model: object
) -> TrainSettings:
    """A stage in its folder, starting from where it says, or from the stage before."""
    given = model if isinstance(model, dict) else {}
    start = settings.model
    if before is not None and "path" not in given:
        # What the recipe does to its first model has been done.
        start = start.replace(
            path=str(before),
            base=given.get("base"),
            add_audio=given.get("add_audio"),
            config=given.get("config") or {},
        )
    return settings.replace(output=str(output), model=start)
