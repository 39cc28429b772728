"""SIGTERM, as clusters send it before they take a machine away: a checkpoint, then the end.

Contract: the step that is under way is finished, a checkpoint of it is written, and training ends.
All ranks end with the same step, whichever of them was told. Processes that read media go on until
then. Outside :meth:`Termination.listening` nothing is changed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from av_llava.errors import AVLlavaError


class TerminatedError(AVLlavaError):
    """A run was asked to end before it was finished; it can be resumed."""

    exit_code = 130


class Termination(TrainerCallback):
    """Ends training after the step in which SIGTERM came."""

    def __init__(self) -> None:
        self.asked = False
        """Whether this process was told to end."""
        self.stopped_at: int | None = None
        """The step after which training was ended."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of SIGTERM meanwhile; in a thread of somebody's program it is left alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Have a checkpoint written and training ended, where a rank was told to."""
        if self._any_rank(args) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step

    def check(self, folder: Path) -> None:
        """Say that training did not come to its end.

        Args:
            folder: of the run.

        Raises:
            TerminatedError: it did not.
        """
        if self.stopped_at is not None:
            raise TerminatedError(
                f"The run in {folder} was told to end (SIGTERM) and did so after step "
                f"{self.stopped_at}, whose checkpoint is written. Go on with --resume."
            )

    def _note(self, *_: Any) -> None:
        self.asked = True

    def _any_rank(self, args: Any) -> bool:
        if args.world_size <= 1:
            return self.asked
        told = torch.tensor(int(self.asked), device=args.device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return bool(told.item())
