"""Files for the servers of benchmarks that keep their answers to themselves.

Contract: one file per column of a run, in the benchmark's own form, written beside the scores; a
question whose answer failed or could not be read is in it as the benchmark wants that said.
"""

from __future__ import annotations

import re
from pathlib import Path

from av_llava_eval.records import write_whole
from av_llava_eval.sample import Prediction
from av_llava_eval.scoring import Scored


def write_submissions(scored: Scored) -> list[Path]:
    """Write what the task's server takes; nothing for tasks that have none.

    Returns:
        The files: the task's name for it, with the column's name before it where there are several.
    """
    out = []
    samples = {s.id: s for s in scored.samples}
    for arm, records in scored.arms.items():
        answers = [(samples[r["id"]], Prediction(r["extracted"], r["how"])) for r in records]
        made = scored.task.submission(answers)
        if made is None:
            continue
        name, text = made
        before = f"{re.sub(r'[^a-zA-Z0-9]+', '-', arm)}." if len(scored.arms) > 1 else ""
        file = scored.folder / f"{before}{name}"
        write_whole(file, text + "\n")
        out.append(file)
    return out
