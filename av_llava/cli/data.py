"""``av-llava data``: what can be done with training data.

Contract: importing this costs typer and the standard library only.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from av_llava.cli import data_synth


def group(guarded: Callable[[Callable[..., int]], Callable[..., int]]) -> typer.Typer:
    """Make the command ``data`` and those below it.

    Args:
        guarded: turns what a command raises into an exit code.
    """
    app = typer.Typer(
        name="data",
        help="Training data: make some to learn with.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )

    @app.callback()
    def about() -> None:
        """Training data: make some to learn with."""

    app.command("synth")(guarded(data_synth.command))
    return app
