"""Mini-benchmarks with open answers: words, captions, spans of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval_mini.form import Mini, Rows, to_json, to_pair, to_parquet, to_tree


def _nextqa() -> list[Mini]:
    rows: Rows = [
        {"video": 400000000 + v, "frame_count": 300, "width": 640, "height": 480,
         "question": f"what is in film {v}", "answer": "a red kite", "qid": q,
         "type": ("CW", "TN")[q], "additional_ref_answer": ("", "kite")[q]}
        for v in (0, 1)
        for q in (0, 1)
    ]  # fmt: skip
    media = ("NExTVideo/400000000.mp4", "NExTVideo/400000001.mp4")
    return [
        Mini("nextqa_oe", rows, to_parquet("OE/test-0.parquet"), media, 4, ids=("qid", "video"))
    ]


def _pairs() -> list[Mini]:
    activity: Rows = [
        {"video_name": f"abc{v}", "question": "is the person outdoors", "answer": "yes",
         "question_id": f"v_abc{v}_{q}", "type": q}
        for v in (0, 1)
        for q in (0, 3)
    ]  # fmt: skip
    media = ("all_test/v_abc0.mp4", "all_test/v_abc1.mkv")
    flat = [{**row, "type": str(row["type"])} for row in activity]
    facts: dict[str, Any] = {"media": media, "n": 4, "ids": ("question_id",)}
    out = [
        Mini("activitynetqa", activity, to_pair, layout="pair", **facts),
        Mini("activitynetqa", flat, to_parquet("test-0.parquet"), layout="parquet", **facts),
    ]
    for name, film, place in (
        ("msvd_qa", "vid1", "videos/vid1.avi"),
        ("msrvtt_qa", "video7010", "videos/all/video7010.mp4"),
    ):
        rows: Rows = [
            {"video_name": film, "question": f"{word} is the man doing?", "answer": "sing",
             "question_id": number}
            for number, word in enumerate(("what", "who"))
        ]  # fmt: skip
        out.append(Mini(name, rows, to_pair, (place,), 2, ids=("question_id",)))
    return out


def _videochatgpt() -> list[Mini]:
    rows: Rows = [
        {"Q": f"What happens in film {v}?", "A": "A man walks through a red door.",
         "video_name": f"v_{v}"}
        for v in (0, 1)
    ]  # fmt: skip
    twice = [
        {"Q1": "What happens?", "Q2": "What is going on?", "A": row["A"],
         "video_name": row["video_name"]}
        for row in rows
    ]  # fmt: skip
    flat = [
        {"video_name": row["video_name"], "question_1": first, "question_2": second,
         "answer": row["A"]}
        for row in rows
        for first, second in (("What happens?", "None"), ("None", "What is going on?"))
    ]  # fmt: skip
    media = ("Test_Videos/v_0.mp4", "Test_Videos/v_1.mp4")
    drop: dict[str, Any] = {"drop": "video_name"}
    return [
        Mini("videochatgpt_gen", rows, to_json("generic_qa.json"), media, 2, **drop),
        Mini("videochatgpt_temporal", rows, to_json("temporal_qa.json"), media, 2, **drop),
        Mini("videochatgpt_consistency", twice, to_json("consistency_qa.json"), media, 4,
             layout="original", **drop),
        Mini("videochatgpt_consistency", flat, to_parquet("Consistency/test-0.parquet"), media, 4,
             layout="parquet", **drop),
    ]  # fmt: skip


def _charades() -> list[Mini]:
    rows: Rows = [
        {
            "video": f"ABC{v}.mp4",
            "caption": "person opens a door.",
            "timestamp": [0.2, 1.0 + v / 10],
        }
        for v in (0, 1)
    ]

    def write(root: Path, rows: Rows) -> None:
        lines = [
            f"{r['video'][:-4]} {r['timestamp'][0]} {r['timestamp'][1]}##{r.get('caption', '')}\n"
            for r in rows
        ]
        (root / "charades_sta_test.txt").write_text("".join(lines))

    media = ("Charades_v1_480/ABC0.mp4", "Charades_v1_480/ABC1.mp4")
    bad = {"timestamp": [3.0, 1.0]}
    return [
        Mini("charades_sta", rows, write, media, 2, layout="original", bad_answer=bad,
             drop="caption"),
        Mini("charades_sta", rows, to_parquet("test-0.parquet"), media, 2, layout="parquet",
             bad_answer=bad, drop="caption"),
    ]  # fmt: skip


def _captioning() -> list[Mini]:
    rows: Rows = [
        {"video_id": f"70{v}", "dim": "speed", "question": "Describe the video.",
         "mc_question": "How does it move?\nA. faster\nB. slower", "mc_answer": "B. slower"}
        for v in (0, 1)
    ]  # fmt: skip
    tree = to_tree("questions/captioning.json", "video_id", "dim")
    media = ("videos/700.mp4", "videos/701.mp4")
    bad = {"mc_answer": "C. never"}
    return [
        Mini("tempcompass_captioning", rows, tree, media, 2, bad_answer=bad, drop="mc_question")
    ]


MINIS = [*_nextqa(), *_pairs(), *_videochatgpt(), *_charades(), *_captioning()]
