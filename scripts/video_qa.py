"""Ask a question about a video with the Python API: what ``av-llava ask`` does, in one page.

python scripts/video_qa.py clip.mp4 "What happens after the bell?"
python scripts/video_qa.py clip.mp4 "What is said?" "Who says it?" --frames 16 --start 90 --end 120
"""

from __future__ import annotations

import argparse
import sys

import av_llava
from av_llava.errors import AVLlavaError


def main() -> int:
    """Load a model, encode the video once, and stream an answer to every question."""
    parser = argparse.ArgumentParser(description="Ask questions about a video.")
    parser.add_argument("video", help="file, folder of frames or http address")
    parser.add_argument("questions", nargs="+", metavar="question")
    parser.add_argument("--model", help="folder or hub id; the default model if left out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--frames", type=int, help="at most so many frames, evenly spaced")
    parser.add_argument("--start", type=float, help="begin here, in seconds")
    parser.add_argument("--end", type=float, help="end here, in seconds")
    parser.add_argument("--audio", default="auto", help="auto, on, off, or a sound file")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest answer")
    wanted = parser.parse_args()

    model = av_llava.load(wanted.model, device=wanted.device)
    if model.is_random:
        print("This model has random weights: its answers mean nothing.", file=sys.stderr)

    # Decoding, both towers and the language model's pass over the video happen here, once.
    session = model.session(
        wanted.video,
        frames=wanted.frames,
        start_s=wanted.start,
        end_s=wanted.end,
        audio=wanted.audio,
        max_new_tokens=wanted.max_tokens,
    )
    for question in wanted.questions:
        stream = session.stream(question)
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        # Frames and times, seconds of sound or why there is none, tokens, device and dtype.
        print(stream.answer.used(), file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AVLlavaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
