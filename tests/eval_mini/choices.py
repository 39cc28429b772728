"""Mini-benchmarks with options, about films."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from av_llava_eval.tasks.mvbench import FOLDERS
from eval_mini.form import (
    Mini,
    Rows,
    to_csv,
    to_files_by,
    to_json,
    to_jsonl,
    to_parquet,
    to_tree,
)

FOUR = ["a red kite", "both of them", "12.5 metres", "before the bell"]
FIVE = [*FOUR, "a man, a child and a dog"]
LETTERED = [f"{a}. {t}" for a, t in zip("ABCD", FOUR, strict=True)]
FIVE_LETTERED = [f"{a}. {t}" for a, t in zip("ABCDE", FIVE, strict=True)]
SRT = (
    "1\n00:00:00,000 --> 00:00:00,900\n"
    '<font color="white" size=".72c">now the bell rings</font>\n\n'
    "2\n00:00:01,000 --> 00:00:01,500\nunmarked words\n"
)


def _videomme() -> list[Mini]:
    rows: Rows = [
        {
            "video_id": f"{v:03d}", "duration": length, "domain": "Knowledge",
            "sub_category": "Geography", "url": f"https://example.invalid/{v}",
            "videoID": f"vid{v}", "question_id": f"{v:03d}-{q}", "task_type": kind,
            "question": f"What is seen in film {v}, part {q}?", "options": LETTERED,
            "answer": "ABCD"[(v + q) % 4],
        }
        for v, length in ((1, "short"), (2, "long"))
        for q, kind in ((1, "Counting Problem"), (2, "OCR Problems"), (3, "Spatial Perception"))
    ]  # fmt: skip
    write = to_parquet("videomme/test-00000-of-00001.parquet")
    media = ("data/vid1.mp4", "data/vid2.mkv")

    def with_subtitles(root: Path, rows: Rows) -> None:
        write(root, rows)
        (root / "subtitle").mkdir(exist_ok=True)
        (root / "subtitle" / "vid1.srt").write_text(SRT, encoding="utf-8")

    facts: dict[str, Any] = {
        "rows": rows, "media": media, "n": 6, "bad_answer": {"answer": "E"},
        "drop": "videoID", "ids": ("question_id",),
    }  # fmt: skip
    return [
        Mini("videomme", write=write, **facts),
        Mini("videomme_w_subtitle", write=with_subtitles, **facts),
        Mini("videomme_w_audio", write=write, **facts),
    ]


def _mvbench() -> list[Mini]:
    rows: Rows = []
    media = []
    for number, (task, folders) in enumerate(FOLDERS.items()):
        film = f"{task}_{number}.mp4" if task != "episodic_reasoning" else "show_frames"
        row = {
            "_task": task, "video": film, "question": f"What happens in {task}?",
            "candidates": FOUR[: 3 + number % 2], "answer": FOUR[number % 3],
        }  # fmt: skip
        # Some lie where they are already cut, some are to be cut.
        folder = folders[number % len(folders)]
        if task in ("action_sequence", "action_localization", "episodic_reasoning"):
            row |= {"start": 0.2, "end": 1.2}
        rows.append(row)
        media.append(f"video/{folders[0] if film == 'show_frames' else folder}/{film}")
    return [
        Mini(
            "mvbench", rows, to_files_by("_task", "json/{}.json"), tuple(media), 20,
            bad_answer={"answer": "nothing of this"}, drop="candidates",
        )
    ]  # fmt: skip


def _nextqa() -> list[Mini]:
    rows: Rows = [
        {
            "video": 4000000000 + v, "frame_count": 300, "width": 640, "height": 480,
            "question": f"why did the boy run at {q} in film {v}", "answer": (v + q) % 5, "qid": q,
            "type": kind, **{f"a{i}": text for i, text in enumerate(FIVE)},
        }
        for v in (0, 1)
        for q, kind in enumerate(("CW", "TN", "DO"))
    ]  # fmt: skip
    csv_file, plain = to_csv("test.csv"), tuple(f"NExTVideo/400000000{v}.mp4" for v in (0, 1))

    def nested(root: Path, rows: Rows) -> None:
        csv_file(root, rows)
        names = {f"400000000{v}": f"10{v}/film{v}" for v in (0, 1)}
        (root / "map_vid_vidorID.json").write_text(json.dumps(names))

    facts: dict[str, Any] = {"rows": rows, "n": 6, "drop": "a3", "ids": ("qid", "video")}
    nested_media = tuple(f"NExTVideo/10{v}/film{v}.mp4" for v in (0, 1))
    return [
        Mini("nextqa_mc", write=nested, media=nested_media, layout="csv",
             bad_answer={"answer": 5}, **facts),
        Mini("nextqa_mc", write=to_parquet("MC/test-00000-of-00001.parquet"), media=plain,
             layout="parquet", bad_answer={"answer": 7}, **facts),
    ]  # fmt: skip


def _egoschema() -> list[Mini]:
    names = [f"0000000{i}-0000-4000-8000-000000000000" for i in range(3)]
    rows: Rows = [
        {"question_idx": str(i), "question": f"What does person {i} do?", "video_idx": name,
         "option": FIVE_LETTERED, "answer": str(i + 1)}
        for i, name in enumerate(names)
    ]  # fmt: skip
    original: Rows = [
        {"q_uid": name, "google_drive_id": "x", "question": f"What does person {i} do?",
         **{f"option {j}": text for j, text in enumerate(FIVE)}}
        for i, name in enumerate(names)
    ]  # fmt: skip

    def write(root: Path, rows: Rows) -> None:
        to_json("questions.json")(root, rows)
        answers = {names[0]: 1, names[2]: 3}
        (root / "subset_answers.json").write_text(json.dumps(answers))

    media = tuple(f"videos/{name}.mp4" for name in names)
    hidden = [{**row, "answer": "None"} for row in rows]
    return [
        Mini("egoschema_subset", rows, to_parquet("Subset/test-00000-of-00001.parquet"), media, 3,
             layout="parquet", bad_answer={"answer": "5"}, drop="option", ids=("video_idx",)),
        Mini("egoschema_subset", original, write, media, 2, layout="original", drop="option 2",
             ids=("q_uid",)),
        Mini("egoschema", original, write, media, 3, layout="original", ids=("q_uid",)),
        Mini("egoschema", hidden, to_parquet("GENERATION/test-00000-of-00001.parquet"), media, 3,
             layout="parquet", drop="option", ids=("video_idx",)),
    ]  # fmt: skip


def _perceptiontest() -> list[Mini]:
    rows: Rows = [
        {"video_name": f"video_{v}", "question": f"Which way does ball {q} go?",
         "question_id": str(q), "options": FOUR[:3], "answer_id": str((v + q) % 3),
         "area": "physics", "reasoning": "descriptive", "tag": ["motion", "object counting"]}
        for v in (1, 2)
        for q in (0, 1)
    ]  # fmt: skip
    original = [
        {("id" if k == "question_id" else k): (int(v) if k in ("question_id", "answer_id") else v)
         for k, v in row.items()}
        for row in rows
    ]  # fmt: skip
    facts: dict[str, Any] = {"media": ("videos/video_1.mp4", "videos/video_2.mp4"), "n": 4}
    return [
        Mini("perceptiontest_val_mc", rows, to_parquet("mc_question_val/validation-0.parquet"),
             layout="parquet", bad_answer={"answer_id": "3"}, drop="area",
             ids=("video_name", "question_id"), **facts),
        Mini("perceptiontest_val_mc", original,
             to_tree("mc_question_valid.json", "video_name", inner="mc_question"),
             layout="original", bad_answer={"answer_id": 3}, drop="options",
             ids=("video_name", "id"), **facts),
    ]  # fmt: skip


def _longvideobench() -> list[Mini]:
    rows: Rows = [
        {
            "video_id": f"lv{v}", "question": f"What is said in film {v}?",
            "question_wo_referring_query": "What is said?", "correct_choice": v,
            "topic_category": "KH-Knowledge-History", "question_category": "S2E",
            "level": "L1-Perception", "id": f"lv{v}_0", "video_path": f"lv{v}.mp4",
            "subtitle_path": f"lv{v}_en.json", "duration_group": 15,
            "starting_timestamp_for_subtitles": 0.5 * v, "duration": 2.5, "view_count": 10,
            **{f"option{i}": (FIVE[i] if i < 3 + v else "N/A") for i in range(5)},
        }
        for v in (0, 1, 2)
    ]  # fmt: skip
    listed = [
        {**{k: v for k, v in row.items() if not k.startswith("option")},
         "candidates": [row[f"option{i}"] for i in range(5) if row[f"option{i}"] != "N/A"]}
        for row in rows
    ]  # fmt: skip

    def write(root: Path, rows: Rows) -> None:
        to_json("lvb_val.json")(root, rows)
        (root / "subtitles").mkdir(exist_ok=True)
        for v in (0, 1, 2):
            said = [
                {"start": "00:00:00.400", "end": "00:00:02.400", "line": f"words of film {v}"},
                {"timestamp": [2.0, None], "text": "the end"},
            ]
            (root / "subtitles" / f"lv{v}_en.json").write_text(json.dumps(said))

    media = tuple(f"videos/lv{v}.mp4" for v in (0, 1, 2))
    facts: dict[str, Any] = {"media": media, "n": 3, "ids": ("id",), "drop": "subtitle_path"}
    bad = {"correct_choice": 5}
    return [
        Mini("longvideobench_val_v", rows, to_parquet("validation-0.parquet"), layout="parquet",
             bad_answer=bad, **facts),
        Mini("longvideobench_val_v", listed, write, layout="json", bad_answer=bad, **facts),
        Mini("longvideobench_val_i", listed, write, bad_answer=bad, **facts),
    ]  # fmt: skip


def _mlvu() -> list[Mini]:
    asked = "What is on the sign?\n" + "\n".join(
        f"({a}) {t}" for a, t in zip("ABCDEF", [*FIVE, "nothing"], strict=True)
    )
    four = "\n".join(asked.split("\n")[:5])
    dev = ("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning")
    test = (*dev[:1], "needleQA", *dev[2:], "sportsQA", "tutorialQA")
    original: Rows = [
        {"_file": f"{i + 1}_{kind}", "video": f"{kind}_{i}.mp4", "duration": 1.6,
         "question": "What is on the sign?", "candidates": FOUR, "answer": FOUR[i % 4],
         "question_type": kind}
        for i, kind in enumerate(dev)
    ]  # fmt: skip
    flat: Rows = [
        {"video_name": f"{kind}_{i}.mp4", "duration": 1.6, "question": four,
         "answer": "ABCD"[i % 4], "task_type": kind}
        for i, kind in enumerate(dev)
    ]  # fmt: skip
    six = [
        {**flat[0], "video_name": f"{kind}_{i}.mp4", "question": asked, "answer": "ABCDEF"[i % 6],
         "task_type": kind}
        for i, kind in enumerate(test)
    ]  # fmt: skip
    bad: dict[str, Any] = {"bad_answer": {"answer": "G"}, "drop": "task_type"}
    return [
        Mini("mlvu_dev", original, to_files_by("_file", "json/{}.json"),
             tuple(f"video/{r['_file']}/{r['video']}" for r in original), 7, layout="original",
             bad_answer={}, drop="video"),
        Mini("mlvu_dev", flat, to_parquet("data/test-0.parquet"),
             tuple(f"video/{r['video_name']}" for r in flat), 7, layout="parquet", **bad),
        Mini("mlvu_test", six, to_parquet("mlvu_test-0.parquet"),
             tuple(f"video/{r['video_name']}" for r in six), 9, **bad),
    ]  # fmt: skip


def _lvbench() -> list[Mini]:
    question = "How often does it ring?"
    rows: Rows = [
        {"key": f"k{v}", "uid": f"50{v}{q}", "video_path": f"k{v}.mp4", "question": f"{question} {q}",
         "options": FOUR, "answer": "ABCD"[q], "question_type": ["entity recognition", "reasoning"],
         "time_reference": "00:01-00:02", "type": "cartoon"}
        for v in (0, 1)
        for q in (0, 1)
    ]  # fmt: skip
    inside = question + "\n" + "\n".join(f"({a}) {t}" for a, t in zip("ABCD", FOUR, strict=True))
    films: Rows = [
        {"key": f"k{v}", "type": "cartoon", "video_info": {"fps": 5},
         "qa": [{"uid": f"50{v}{q}", "question": f"{q}. {inside}", "answer": "ABCD"[q],
                 "question_type": ["reasoning"], "time_reference": "00:01"} for q in (0, 1)]}
        for v in (0, 1)
    ]  # fmt: skip
    media = ("video/k0.mp4", "video/k1.mp4")
    return [
        Mini("lvbench", rows, to_parquet("data/train-0.parquet"), media, 4, layout="parquet",
             bad_answer={"answer": "E"}, drop="question_type", ids=("uid",)),
        Mini("lvbench", films, to_jsonl("video_info.meta.jsonl"), media, 4, layout="original",
             drop="key", ids=("key",)),
    ]  # fmt: skip


def _tempcompass() -> list[Mini]:
    lines = "\n".join(LETTERED[:2])
    asked = {
        "multi-choice": (f"Which way does it turn?\n{lines}", LETTERED[1], {"answer": "Z. no"}),
        "yes_no": ("Is the wheel turning faster?", "yes", {"answer": "maybe"}),
        "caption_matching": (
            "Which sentence fits the video?\nSentence A: It speeds up.\nSentence B: It slows down.",
            "Sentence B: It slows down.",
            {"answer": "Sentence C: It stops."},
        ),
    }
    out = []
    for stem, (question, answer, bad) in asked.items():
        rows: Rows = [
            {"video_id": f"70{v}", "dim": dim, "question": question, "answer": answer}
            for v in (0, 1)
            for dim in ("speed", "order")
        ]
        name = f"tempcompass_{stem.replace('-', '_')}"
        media = ("videos/700.mp4", "videos/701.mp4")
        tree = to_tree(f"questions/{stem}.json", "video_id", "dim")
        out += [
            Mini(name, rows, tree, media, 4, layout="original", bad_answer=bad),
            Mini(name, rows, to_parquet(f"{stem}/test-0.parquet"), media, 4, layout="parquet",
                 bad_answer=bad),
        ]  # fmt: skip
    return out


def _videommmu() -> list[Mini]:
    kinds = (("Physics", "multiple-choice", FIVE, "C"), ("Art_Theory", "open", [], "3,200"))
    rows: Rows = [
        {"id": f"validation_{subject}_{i}", "question": f"What is computed in lecture {i}?",
         "options": options, "answer": answer, "question_type": kind}
        for i, (subject, kind, options, answer) in enumerate(kinds)
    ]  # fmt: skip
    media = ("Science/validation_Physics_0.mp4", "Art/validation_Art_Theory_1.mp4")
    return [
        Mini("videommmu", rows, to_parquet("Adaptation/test-0.parquet"), media, 2,
             bad_answer={"answer": "F", "options": FIVE, "question_type": "multiple-choice"},
             drop="answer", ids=("id",)),
        Mini("videommmu", rows[:1], to_json("Perception.json"), media[:1], 1, split="Perception",
             layout="json", bad_answer={"answer": "F"}, ids=("id",)),
    ]  # fmt: skip


MINIS = [
    *_videomme(),
    *_mvbench(),
    *_nextqa(),
    *_egoschema(),
    *_perceptiontest(),
    *_longvideobench(),
    *_mlvu(),
    *_lvbench(),
    *_tempcompass(),
    *_videommmu(),
]
