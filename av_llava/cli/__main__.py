"""``python -m av_llava.cli``, the same as ``av-llava``."""

from __future__ import annotations

import sys

from av_llava.cli.main import run

if __name__ == "__main__":
    sys.exit(run())
