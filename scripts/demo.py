"""What ``make demo`` runs: a real H.264 + AAC file through the whole path, by the real program.

python scripts/demo.py            writes demo/clip.mp4 and asks about it
python scripts/demo.py FILE       asks about a file of yours

The clip is one of the synthetic world that the shipped model learned in (docs/tiny.md), but of a
split that it has never seen: a white circle moves down, then a red square does, and a bell rings.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from av_llava.training.world.parts import Scene
from av_llava.training.world.scene import sample_scene
from av_llava.training.world.write import write_clip

FOLDER = Path(__file__).resolve().parents[1] / "demo"
SEED, INDEX, SPLIT = 1, 38452, "demo"
QUESTIONS = {
    "What sound do you hear?": "bell",
    "Which way does the square move?": "down",
    "What colour is the square?": "red",
    "Which shape moved when the sound played?": "square",
}
"""With what is right."""


def scene() -> Scene:
    """What happens in the clip."""
    return sample_scene(SEED, INDEX, SPLIT)


def write(path: Path) -> Path:
    """Write the clip."""
    path.parent.mkdir(exist_ok=True)
    return write_clip(scene(), path)


def av_llava(*words: str) -> None:
    """Run the installed program and show the command; end with its exit code if it fails."""
    installed = Path(sys.executable).with_name("av-llava")
    program = [str(installed)] if installed.exists() else [sys.executable, "-m", "av_llava.cli"]
    print(f"\n$ {shlex.join(['av-llava', *words])}", flush=True)
    done = subprocess.run([*program, *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Write the clip unless a file is given, then look at it, plan, and ask."""
    if len(sys.argv) > 1:
        clip, questions = sys.argv[1], [" ".join(sys.argv[2:]) or "What happens in this video?"]
    else:
        clip, questions = os.path.relpath(write(FOLDER / "clip.mp4")), list(QUESTIONS)
        print(f"Wrote {clip}: {scene().duration_s:g} s of H.264 picture and AAC sound.")
    if not os.environ.get("AV_LLAVA_MODEL"):
        print(
            "The model below is the small one that ships: it knows the clips of docs/tiny.md and\n"
            "nothing else. AV_LLAVA_MODEL=path/to/checkpoint asks another one."
        )
    av_llava("info", clip)
    av_llava("ask", clip, questions[0], "--show-plan")
    for question in questions:
        av_llava("ask", clip, question, "--max-tokens", "48")
        if len(sys.argv) == 1:
            print(f"(Right is: {QUESTIONS[question]}.)", flush=True)


if __name__ == "__main__":
    main()
