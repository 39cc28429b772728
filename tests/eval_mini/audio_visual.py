"""Mini-benchmarks about sound and picture together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval_mini.choices import FOUR, LETTERED, SRT
from eval_mini.form import Mini, Rows, to_csv, to_files_by, to_json, to_jsonl, to_parquet


def _music_avqa() -> list[Mini]:
    asked = (
        ('["Audio", "Counting"]', "How many instruments sound?", "[]", "two"),
        ('["Audio-Visual", "Location"]', "Is the <Object> left of the <Object>?",
         '["violin", "piano"]', "yes"),
        ('["Visual", "Location"]', "What is left?", "[]", "acoustic_guitar"),
    )  # fmt: skip
    rows: Rows = [
        {"question_id": number, "video_id": f"0000000{number % 2}", "type": kind,
         "question_content": question, "templ_values": values, "question_deleted": 0, "anser": said}
        for number, (kind, question, values, said) in enumerate(asked)
    ]  # fmt: skip
    rows.insert(0, {**rows[0], "question_id": 99, "question_deleted": 1})
    media = ("videos/00000000.mp4", "videos/00000001.mp4")
    return [
        Mini("music_avqa", rows, to_json("json/avqa-test.json"), media, 3, drop="anser",
             ids=("question_id",))
    ]  # fmt: skip


def _avqa() -> list[Mini]:
    rows: Rows = [
        {"id": v, "video_name": f"-HG3_{v}", "video_id": v, "question_text": "What happens?",
         "multi_choice": FOUR, "answer": v, "question_relation": "Both",
         "question_type": "Happening"}
        for v in (0, 1)
    ]  # fmt: skip
    media = ("videos/-HG3_0.mp4", "videos/-HG3_1.mp4")
    return [
        Mini("avqa", rows, to_json("val_qa.json"), media, 2, bad_answer={"answer": 4},
             drop="question_text", ids=("id",))
    ]  # fmt: skip


def _worldsense() -> list[Mini]:
    rows: Rows = [
        {"index": v, "video": f"ws{v // 2}", "question": f"What is heard, part {v}?",
         "candidates": LETTERED[: 3 + v % 2], "answer": "ABC"[v], "task_type": "Audio Recognition",
         "task_domain": "Music", "duration": "<1min", "audio_class": ["Speech", "Music"],
         "video_path": f"videos/ws{v // 2}.mp4", "audio_path": f"audios/ws{v // 2}.wav",
         "subtitle_path": f"subtitles/ws{v // 2}.srt"}
        for v in (0, 1, 2)
    ]  # fmt: skip
    media = ("videos/ws0.mp4", "videos/ws1.mp4")
    facts: dict[str, Any] = {
        "media": media, "n": 3, "bad_answer": {"answer": "E"}, "drop": "candidates",
        "ids": ("index",),
    }  # fmt: skip
    table = to_parquet("test-0.parquet")

    def with_subtitles(root: Path, rows: Rows) -> None:
        table(root, rows)
        (root / "subtitles").mkdir(exist_ok=True)
        (root / "subtitles" / "ws0.srt").write_text(SRT)

    tasks = {"question", "candidates", "answer", "task_type", "task_domain"}
    own = ("index", "video", "video_path", "audio_path", "subtitle_path")

    def original(root: Path, rows: Rows) -> None:
        films: dict[str, dict[str, Any]] = {}
        for row in rows:
            film = {k: v for k, v in row.items() if k not in tasks and k not in own}
            film["video_duration"] = "2s"
            at = films.setdefault(row["video"], {"video_id": row["video"], **film})
            at[f"task{len([k for k in at if k.startswith('task')])}"] = {
                k: v for k, v in row.items() if k in tasks
            }
        (root / "worldsense_qa.json").write_text(json.dumps(films))

    return [
        Mini("worldsense", rows, original, layout="original", **{**facts, "ids": ()}),
        Mini("worldsense", rows, to_jsonl("worldsense_qa.jsonl"), layout="jsonl", **facts),
        Mini("worldsense", rows, table, layout="parquet", **facts),
        Mini("worldsense_w_subtitle", rows, with_subtitles, **facts),
    ]


def _dailyomni() -> list[Mini]:
    rows: Rows = [
        {"Question": f"Which sound comes with flash {v}?", "Choice": LETTERED, "Answer": "ABCD"[v],
         "video_id": f"dv{v}", "Type": "Event Sequence", "content_parent_category": "Education",
         "content_fine_category": "Demo", "video_category": "Education", "video_duration": "30s"}
        for v in (0, 1)
    ]  # fmt: skip
    media = ("Videos/dv0/dv0_video.mp4", "Videos/dv1/dv1_video.mp4")
    return [
        Mini("dailyomni", rows, to_json("qa.json"), media, 2, bad_answer={"Answer": "E"},
             drop="Choice")
    ]  # fmt: skip


def _omni_bench() -> list[Mini]:
    rows: Rows = [
        {"index": v, "task type": "Action", "audio type": "speech", "question": "Who speaks?",
         "options": FOUR, "answer": FOUR[v], "audio_path": f"{v}.wav", "image_path": f"{v}.jpg",
         "audio content": "words", "image content": "a picture"}
        for v in (0, 1)
    ]  # fmt: skip
    media = tuple(
        f"mm_data/{k}/{v}.{e}" for v in (0, 1) for k, e in (("audio", "wav"), ("image", "jpg"))
    )
    return [
        Mini("omni_bench", rows, to_jsonl("dataset/batch-5_1142.jsonl"), media, 2,
             bad_answer={"answer": "nobody"}, drop="options", ids=("index",))
    ]  # fmt: skip


def _omnivideobench() -> list[Mini]:
    rows: Rows = [
        {"video": f"video_{v}", "video_type": "Vlog", "duration": ("00:02", "12:00")[v],
         "questions": [
             {"question": f"What follows word {q}?", "question_type": "counting",
              "audio_type": "Speech", "reasoning_steps": [], "answer": "x",
              "options": [o.replace(". ", ".") for o in LETTERED], "correct_option": "AB"[q]}
             for q in (0, 1)
         ]}
        for v in (0, 1)
    ]  # fmt: skip
    media = ("videos/video_0.mp4", "videos/video_1.mp4")
    return [
        Mini("omnivideobench", rows, to_json("data.json"), media, 4, drop="video", ids=("video",))
    ]


def _avhbench() -> list[Mini]:
    tasks = (
        ("AV Captioning", "Describe what you see and hear.", "A man is asleep and snores."),
        ("Video-driven Audio Hallucination", "Is the couch making sound?", "No"),
        ("Audio-driven Video Hallucination", "Is the man visible?", "Yes"),
        ("AV Matching", "Do sound and picture match?", "Yes"),
    )
    rows: Rows = [
        {"video_id": film, "task": task, "text": text, "label": label}
        for film in ("00191", "00191_swap")
        for task, text, label in tasks
    ]
    media = ("video/00191.mp4", "video/00191_swap.mp4")
    folder = to_files_by("_file", "json/{}.json")

    def by_film(root: Path, rows: Rows) -> None:
        folder(root, [{**row, "_file": str(row["video_id"])[:5]} for row in rows])

    facts: dict[str, Any] = {"media": media, "drop": "text"}
    return [
        Mini("avhbench", rows, by_film, n=6, layout="folder", bad_answer={"label": "Maybe"}, **facts),
        Mini("avhbench", rows, to_json("QA.json"), n=6, layout="file",
             bad_answer={"label": "Maybe"}, **facts),
        Mini("avhbench_captioning", rows[:1] + rows[4:5], by_film, n=2, **facts),
    ]  # fmt: skip


def _av_odyssey() -> list[Mini]:
    rows: Rows = [
        {"question_id": f"q{v}", "question": "Which sound [audio1] belongs to [video1]?",
         "options": LETTERED, "answer": "AB"[v], "data_type": "video",
         "video_path": [f"v/{v}.mp4"], "image_path": [], "audio_path": [f"a/{v}.wav"],
         "subfield": "Timbre"}
        for v in (0, 1)
    ]  # fmt: skip
    media = ("v/0.mp4", "v/1.mp4", "a/0.wav", "a/1.wav")
    return [
        Mini("av_odyssey", rows, to_json("av_odyssey.json"), media, 2, bad_answer={"answer": "E"},
             drop="subfield", ids=("question_id",))
    ]  # fmt: skip


def _speakerbench() -> list[Mini]:
    rows: Rows = [
        {"question_id": v, "question": "Who speaks first?", "choices": repr(LETTERED),
         "answer": "CD"[v], "task_id": "speaker counting", "audio_visual_path": f"av/{v}.mp4",
         "audio_path": f"a/{v}.wav", "visual_path": f"v/{v}_silent.mp4"}
        for v in (0, 1)
    ]  # fmt: skip
    kinds = {
        "audiovisual": ("av/0.mp4", "av/1.mp4"),
        "audio": ("a/0.wav", "a/1.wav"),
        "visual": ("v/0_silent.mp4", "v/1_silent.mp4"),
    }
    return [
        Mini(f"av_speakerbench_{kind}", rows, to_csv("test.csv"), media, 2,
             bad_answer={"answer": "E"}, drop="task_id", ids=("question_id",))
        for kind, media in kinds.items()
    ]  # fmt: skip


def _world() -> list[Mini]:
    rows: Rows = [
        {"id": "c0-0", "video": "clips/c0.mp4", "conversations": [], "kind": "colour",
         "needs": ["slow", "vision"], "question": "What colour is the star?", "answer": "red",
         "choices": ["red", "green", "blue"]},
        {"id": "c1-0", "audio": "clips/c1.wav", "conversations": [], "kind": "sound",
         "needs": ["audio"], "question": "What sound do you hear?", "answer": "beep",
         "choices": ["beep", "buzz"]},
    ]  # fmt: skip
    talks: Rows = [
        {"id": "c0", "video": "clips/c0.mp4", "kind": ["colour", "sound"],
         "needs": [["slow", "vision"], ["audio"]],
         "conversations": [
             {"from": "human", "value": "<video>\nWhat colour is the star?"},
             {"from": "gpt", "value": "red"},
             {"from": "human", "value": "What sound do you hear?"},
             {"from": "gpt", "value": "beep"},
         ]},
    ]  # fmt: skip
    return [
        Mini("world", rows, to_json("test.json"), ("clips/c0.mp4", "clips/c1.wav"), 2,
             layout="question", bad_answer={"answer": "gong"}, ids=("id",)),
        Mini("world", talks, to_json("val.json"), ("clips/c0.mp4",), 2, split="val",
             layout="conversation", drop="conversations", ids=("id",)),
    ]  # fmt: skip


MINIS = [
    *_music_avqa(),
    *_avqa(),
    *_worldsense(),
    *_dailyomni(),
    *_omni_bench(),
    *_omnivideobench(),
    *_avhbench(),
    *_av_odyssey(),
    *_speakerbench(),
    *_world(),
]
