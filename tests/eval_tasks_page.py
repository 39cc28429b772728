"""docs/tasks.md, made from the registry of tasks; test_tasks_page.py compares.

``python tests/eval_tasks_page.py`` brings the page up to date.
"""

from __future__ import annotations

import json
from pathlib import Path

from av_llava_eval.task import Task, get_task, task_names

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tasks.md"
GOLDENS = Path(__file__).parent / "goldens" / "eval"

HEAD = """# Benchmarks

What `av-llava eval` knows, what each benchmark needs below the folder of `--data`, and how it is
scored. Annotations are read from the benchmark's own files; nothing is downloaded. Media whose
names differ in their ending only (`.mkv` for `.mp4`) are found too. This page is made from the code
(`python tests/eval_tasks_page.py`); sizes are those that the benchmarks' authors give.

How answers are read: a letter is never guessed, there is no default letter, and no question is left
out. An answer that cannot be read counts as wrong and is counted as unparsed beside it. With
`--compat lmms` the same answers are scored as lmms-eval does it, quirks included; where that draws a
random letter, its expectation is taken. The column *agrees* names what is compared with the
published scorers, record by record, in tests/eval/test_goldens.py.

"""
NOTES = """## Notes

- **Sound.** Tasks marked ♪ are about sound. For every other one, too, the video's own sound is used
  where the model has ears, unless `--audio off`; `videomme_w_audio` is Video-MME under a name of
  its own.
- **Subtitles.** `videomme_w_subtitle` and `worldsense_w_subtitle` put all lines of the film before
  the question; the style `lmms` puts those that 32 even frames show, and the style `frames`
  those of the frames that the model sees, as Video-MME's authors ask. `longvideobench_val_i` gives the lines during which
  one of 16 even frames lies; its style `lmms` marks each frame in the text with `<image>`, which is
  for comparison only.
- **Judges.** Open answers are scored offline by exact match, containment and overlap of words.
  `--judge` adds `judge_accuracy` and `judge_score` from 0 to 1. The judge's question is our own
  wording: published numbers were made with several wordings and models, and differ by ten points.
  TempCompass's `rule_or_judge` is its published rule with a judge for what that cannot read.
- **NExT-QA, open-ended.** The published WUPS needs WordNet and a part-of-speech tagger. With
  WordNet's files in `wordnet/` a WUPS without the tagger is given; it is close to the published
  one, not equal. Without them there is none.
- **EgoSchema.** Only the subset has public answers. The full set gives a file for the benchmark's
  own server.
- **AV-Odyssey.** Its questions place several media inside one text. They are loaded and scored, but
  the runner shows at most one film, one sound and some pictures beside the text.
- **`--compat lmms` where lmms-eval has no such benchmark** takes the rule of the benchmark's own script
  (Daily-Omni, OmniVideoBench), of VideoLLaMA2 (MUSIC-AVQA), or ours (all others).
- **Daily-Omni.** The benchmark's own scripts score in three ways, which give 18, 28 and 39 % for the
  same answers; `--compat lmms` gives that of Qwen2.5-Omni, and the aggregate holds all three.
"""


def page() -> str:
    """The whole page."""
    lines = [
        "| task | benchmark | below `--data` | size | metric, headline | by | agrees |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [" | ".join(["", *_cells(get_task(name)), ""]).strip() for name in task_names()]
    return HEAD + "\n".join(lines) + "\n\n" + NOTES


def _cells(task: Task) -> list[str]:
    splits = "" if len(task.splits) == 1 else f"; splits {_some(task.splits)}"
    needs = "; ".join(f"`{n}`" if _is_path(n) else n for n in task.needs) + splits
    kind, _, field = task.headline.partition(":")
    mean = "mean" if kind == "micro" else f"mean over {field}"
    by = ", ".join(task.groupings) or "–"
    cells = [f"`{task.name}`", task.title + (" ♪" if task.hears else ""), needs, task.size or "–"]
    return [
        c.replace("|", "\\|") for c in [*cells, f"{task.metric}, {mean}", by, _agrees(task.name)]
    ]


def _is_path(need: str) -> bool:
    return " " not in need or "*" in need


def _some(splits: tuple[str, ...]) -> str:
    named = [f"`{s}`" for s in splits[:3]]
    return ", ".join(named) + (f" and {len(splits) - 3} more" if len(splits) > 3 else "")


def _agrees(name: str) -> str:
    file = GOLDENS / f"{name}.jsonl"
    special = {
        "videomme_w_subtitle": "prompts",
        "longvideobench_val_i": "prompts",
        "activitynetqa": "prompts, judge's words",
    }
    if name in special:
        return special[name]
    if not file.is_file():
        return "–"
    first = json.loads(file.read_text(encoding="utf-8").split("\n", 1)[0])
    return "scores, prompts" if "reference_prompt_sha256" in first else "scores"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
