"""What single benchmarks have of their own: bounds, folders, subtitles, judges, submissions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from eval_mini import MINIS, Media, Mini
from eval_stand_in import StandIn

from av_llava.errors import DataError, UsageError
from av_llava_eval import get_task
from av_llava_eval.experiment import Arm
from av_llava_eval.runner import RunSettings, run
from av_llava_eval.sample import Prediction
from av_llava_eval.scoring import score_folder
from av_llava_eval.submission import write_submissions


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Media:
    return Media(tmp_path_factory.mktemp("media"))


def mini(name: str) -> Mini:
    return next(m for m in MINIS if m.name == name)


def test_mvbench_cuts_films_that_are_not_cut_and_counts_frames_of_folders(
    media: Media, tmp_path: Path
) -> None:
    data = mini("mvbench").build(tmp_path, media)
    task = get_task("mvbench")
    found = {s.meta["sub_task"]: s for s in task.load(data)}
    whole, cut = found["action_sequence"], found["action_localization"]
    assert (whole.start_s, whole.end_s) == (0.2, 1.2)
    assert cut.video is not None and "sta_video_segment" in cut.video.parts
    assert (cut.start_s, cut.end_s) == (None, None)
    frames = found["episodic_reasoning"]
    assert frames.video is not None and frames.video.is_dir()
    assert (frames.source_fps, frames.start_s, frames.end_s) == (3.0, 0.2, 1.2)
    only = list(task.load(data, "action_count"))
    assert [s.id for s in only] == [
        s.id for s in task.load(data) if s.id.startswith("action_count")
    ]
    with pytest.raises(UsageError, match="split of mvbench 'action_cuont'.*'action_count'"):
        list(task.load(data, "action_cuont"))
    (data / "json" / "state_change.json").unlink()
    with pytest.raises(DataError, match="lacks 1 of 20 subtasks.*json/state_change.json.*--split"):
        list(task.load(data))


def test_the_macro_headline_of_mvbench_weighs_subtasks_alike() -> None:
    task = get_task("mvbench")
    rows = [("action_count", 1.0)] * 3 + [("scene_transition", 0.0)]
    records = [{"id": str(i), "score": s, "meta": {"sub_task": t}} for i, (t, s) in enumerate(rows)]
    assert task.aggregate(records)["headline"] == 0.5


def test_subtitles_of_videomme(media: Media, tmp_path: Path) -> None:
    data = mini("videomme_w_subtitle").build(tmp_path, media)
    task = get_task("videomme_w_subtitle")
    assert task.check(data) == []
    first, *_, last = task.load(data)
    ours, theirs = task.prompt(first), task.prompt(first, "lmms")
    assert "now the bell rings\nunmarked words\n" in ours
    assert "now the bell rings\n" in theirs and "unmarked" not in theirs
    assert "subtitles are:" not in task.prompt(last)
    assert "No subtitles available" in task.prompt(last, "lmms")
    # A film that is missing does not keep the others from being asked.
    (data / "data" / "vid1.mp4").unlink()
    assert "No subtitles available" in task.prompt(first, "lmms")
    assert "such as" in task.check(data)[0]
    media.put(data / "data" / "vid1.mp4")
    (data / "subtitle" / "vid1.srt").unlink()
    assert "None of 2 films has subtitles" in task.check(data)[0]


def test_subtitles_of_the_frames_that_the_model_sees(media: Media, tmp_path: Path) -> None:
    data = mini("videomme_w_subtitle").build(tmp_path, media)
    for task in (get_task("videomme_w_subtitle"), get_task("worldsense_w_subtitle")):
        (tmp_path / "two.srt").write_text(
            "1\n00:00:00,000 --> 00:00:02,000\nearly\n\n2\n00:00:08,000 --> 00:00:09,000\nlate\n"
        )
        first = replace(next(get_task("videomme").load(data)), subtitles=tmp_path / "two.srt")
        assert "early\nlate\n" in task.prompt(first, "frames")
        some = task.prompt_of_frames(first, "frames", (0.5, 4.0))
        assert "are:\nearly\n\n" in some and "late" not in some
        blind = task.prompt_of_frames(first, "frames", ())
        assert "subtitles" not in blind and blind in some


def test_subtitles_of_longvideobench(media: Media, tmp_path: Path) -> None:
    data = mini("longvideobench_val_i").build(tmp_path, media)
    task = get_task("longvideobench_val_i")
    samples = list(task.load(data))
    assert "[0 s] words of film 0\n" in task.prompt(samples[0])
    assert task.prompt(samples[0], "lmms").count("<image>") == 2
    missing = samples[1].subtitles
    assert missing is not None
    missing.unlink()
    assert "1 of 3 subtitles are missing, such as" in task.check(data)[0]
    with pytest.raises(DataError, match="lv1_en.json.*cannot be read"):
        task.prompt(samples[1])


def test_subtitles_of_worldsense_in_both_styles(media: Media, tmp_path: Path) -> None:
    data = mini("worldsense_w_subtitle").build(tmp_path, media)
    task = get_task("worldsense_w_subtitle")
    first, *_, last = task.load(data)
    assert "now the bell rings\nunmarked words" in task.prompt(first)
    assert '<font color="white"' in task.prompt(first, "lmms")
    assert "No subtitles available" in task.prompt(last, "lmms")


def test_lengths_are_read_where_the_annotations_have_them(media: Media, tmp_path: Path) -> None:
    lengths = {
        "dailyomni": 30.0, "worldsense-original": 2.0, "worldsense-jsonl": None,
        "omnivideobench": 2.0, "mlvu_test": 1.6, "longvideobench_val_v-json": 2.5,
    }  # fmt: skip
    for name, expected in lengths.items():
        data = mini(name).build(tmp_path / name, media)
        assert next(get_task(mini(name).task).load(data)).duration_s == expected, name


def test_the_synthetic_world_as_it_is_made(tmp_path: Path) -> None:
    from av_llava.training.world import SceneSettings, synthesize

    settings = SceneSettings()
    task = get_task("world")
    for form, split in (("question", "test"), ("conversation", "val")):
        synthesize(tmp_path, 3, split=split, settings=settings, form=form)
        samples = list(task.load(tmp_path, split))
        assert task.check(tmp_path, split) == []
        assert len({s.group for s in samples}) == 3 and len(samples) >= 3
        # Without choices the word must stand alone.
        says = "It is {}." if form == "question" else "{}."
        right = task.aggregate([task.score_sample(s, says.format(s.answer)) for s in samples])
        assert right["headline"] == 1.0
        wrong = task.aggregate([task.score_sample(s, "purple") for s in samples])
        assert wrong["headline"] < 0.5
        chances = [task.chance(s) for s in samples]
        assert all((c is not None and 0 < c <= 0.5) == (form == "question") for c in chances)


def test_the_submission_of_egoschema(media: Media, tmp_path: Path) -> None:
    data = mini("egoschema-original").build(tmp_path, media)
    task = get_task("egoschema")
    samples = list(task.load(data))
    read = [Prediction("C", "letter"), Prediction(None, "unparsed"), Prediction("E", "letter")]
    made = task.submission(list(zip(samples, read, strict=True)))
    assert made is not None
    name, text = made
    assert name.endswith(".json")
    assert list(json.loads(text).values()) == [2, -1, 4]
    assert list(json.loads(text)) == [s.id for s in samples]
    records = [task.score_sample(s, "A") for s in samples]
    assert {r["labelled"] for r in records} == {True, False}


def test_a_run_leaves_a_file_for_the_server(media: Media, tmp_path: Path) -> None:
    data = mini("egoschema-original").build(tmp_path / "data", media)
    task, folder = get_task("egoschema"), tmp_path / "run"
    arms = (Arm("audio on", sound="on"), Arm("audio off", sound="off"))
    run(task, data, folder, StandIn, RunSettings(arms=arms, workers=0))
    files = write_submissions(score_folder(folder))
    assert [f.name for f in files] == [
        "audio-on.egoschema_submission.json", "audio-off.egoschema_submission.json"
    ]  # fmt: skip
    for file in files:
        assert set(json.loads(file.read_text())) == {s.id for s in task.load(data)}
    # Failures are in it, too.
    failing = StandIn(fail={s.group: "missing" for s in task.load(data)})
    run(task, data, tmp_path / "two", lambda: failing, RunSettings(workers=0))
    (only,) = write_submissions(score_folder(tmp_path / "two"))
    assert only.name == "egoschema_submission.json"
    assert set(json.loads(only.read_text()).values()) == {-1}
    one = mini("nextqa_mc-csv").build(tmp_path / "nextqa", media)
    run(get_task("nextqa_mc"), one, tmp_path / "three", StandIn, RunSettings(workers=0))
    assert write_submissions(score_folder(tmp_path / "three")) == []


def test_rows_without_an_answer_are_not_of_the_subset(media: Media, tmp_path: Path) -> None:
    def change(rows: list[dict[str, object]]) -> None:
        rows[1]["answer"] = "None"

    data = mini("egoschema_subset-parquet").build(tmp_path, media, change)
    with pytest.raises(DataError, match="row 1.*no answer"):
        list(get_task("egoschema_subset").load(data))


def test_gaps_of_music_avqa_are_filled() -> None:
    row = {
        "video_id": "1", "question_id": 1, "type": '["Audio-Visual", "Location"]',
        "question_content": "Is the <Object> <LR> of the <Object>?", "question_deleted": 0,
        "templ_values": '["cello", "left", "piano"]', "anser": "no",
    }  # fmt: skip
    task = get_task("music_avqa")
    sample = task.sample(row, 0, Path())
    assert sample.question == "Is the cello left of the piano?"
    assert sample.meta == {"modality": "Audio-Visual", "type": "Audio-Visual Location"}
    with pytest.raises(DataError, match="more gaps than values"):
        task.sample({**row, "templ_values": "[]"}, 0, Path())
    for said, score in (("No.", 1.0), ("no, it is not", 1.0), ("yes", 0.0), ("perhaps", None)):
        assert task.score_record(row, said)["score"] == score
    assert task.score_record({**row, "anser": "two"}, "2")["score"] == 1.0
    assert task.score_record({**row, "anser": "harp"}, "A harp")["score"] == 1.0


def test_precision_and_recall_of_yes() -> None:
    task = get_task("avhbench")
    said = (("Yes", "Yes"), ("Yes", "no"), ("No", "yes"), ("No", "No."), ("No", "who knows"))
    records = [
        task.score_record({"video_id": "1", "task": "AV Matching", "text": "Is it?", "label": a}, b)
        for a, b in said
    ]
    out = task.aggregate(records)
    assert out["headline"] == pytest.approx(2 / 5) and out["unparsed"] == 1
    metrics = out["metrics"]
    assert (metrics["yes_precision"], metrics["yes_recall"]) == (0.5, 0.5)
    assert (metrics["yes_f1"], metrics["yes_share"]) == (0.5, 0.4)


@pytest.mark.parametrize(
    ("name", "verdict", "scores"),
    [
        ("activitynetqa", "{'pred': 'yes', 'score': 4}", {"judge_accuracy": 1.0, "judge_score": 0.8}),
        ("msvd_qa", "{'pred': 'no', 'score': 1}", {"judge_accuracy": 0.0, "judge_score": 0.2}),
        ("activitynetqa", "{'pred': 'maybe', 'score': 4}", None),
        ("activitynetqa", "{'pred': 'yes', 'score': 7}", None),
        ("activitynetqa", "It is right.", None),
        ("tempcompass_yes_no", "Incorrect.", {"rule_or_judge": 0.0}),
        ("tempcompass_captioning", "Correct", {"rule_or_judge": 1.0}),
        ("tempcompass_captioning", "Well", None),
        (
            "videochatgpt_gen",
            "{'correctness': 5, 'detail': 4, 'context': '3'}",
            {"judge_correctness": 1.0, "judge_detail": 0.8, "judge_context": 0.6},
        ),
        ("videochatgpt_gen", "{'correctness': 5}", None),
        ("videochatgpt_temporal", '{"temporal": 2}', {"judge_temporal": 0.4}),
        ("videochatgpt_consistency", "{'consistency': 6}", None),
    ],
)  # fmt: skip
def test_verdicts_of_judges(name: str, verdict: str, scores: dict[str, float] | None) -> None:
    found = get_task(name).read_verdict(verdict)
    assert found == (None if scores is None else pytest.approx(scores))


@pytest.mark.parametrize(
    "name",
    ["activitynetqa-pair", "msrvtt_qa", "nextqa_oe", "videochatgpt_gen", "tempcompass_captioning"],
)
def test_the_judge_is_shown_question_answer_and_what_is_right(
    name: str, media: Media, tmp_path: Path
) -> None:
    small = mini(name)
    data = small.build(tmp_path, media)
    task = get_task(small.task)
    for sample in task.load(data):
        asked = task.judge_prompt(sample, "a green door")
        right = sample.answer
        assert asked is not None and "a green door" in asked and str(right) in asked
    choice = get_task("videomme")
    assert choice.judge_prompt(sample, "A") is None


def test_tempcompass_asks_a_judge_only_for_what_the_published_rule_cannot_read() -> None:
    row = {"video_id": "1", "dim": "speed", "question": "Faster?", "answer": "yes"}
    task = get_task("tempcompass_yes_no")
    sample = task.sample(row, 0, Path())
    assert task.judge_prompt(sample, "Yes it is") is None
    assert task.judge_prompt(sample, "It speeds up") is not None
    lettered = {**row, "question": "Which?\nA. up\nB. down", "answer": "B. down"}
    task = get_task("tempcompass_multi_choice")
    sample = task.sample(lettered, 0, Path())
    assert task.judge_prompt(sample, "B") is None
    assert task.score_record(lettered, "B")["metrics"] == {"rule_or_judge": 1.0}
    assert task.score_record(lettered, "It is B")["metrics"] == {}
    assert task.judge_prompt(sample, "The answer is B") is not None
    # Our own rule reads that without one.
    assert task.score_record(lettered, "The answer is B")["score"] == 1.0
    assert task.score_record(lettered, "The answer is B", "lmms")["score"] == 0.0


def test_captions_are_matched_by_label_or_text() -> None:
    question = "Which fits?\nCaption A: It speeds up.\nCaption B: It slows down."
    row = {
        "video_id": "1",
        "dim": "speed",
        "question": question,
        "answer": "Caption B: It slows down.",
    }
    task = get_task("tempcompass_caption_matching")
    for said in ("B", "Caption B", "caption b.", "Caption B: It slows down.", "It slows down",
                 "I would say caption B."):  # fmt: skip
        assert task.score_record(row, said)["score"] == 1.0, said
    for said in ("A", "Caption A", "It speeds up"):
        assert task.score_record(row, said)["score"] == 0.0, said
    for said in ("Both", "Caption A or Caption B", ""):
        assert task.score_record(row, said)["score"] is None, said


def test_a_file_for_questions_without_answers_is_named(media: Media, tmp_path: Path) -> None:
    data = mini("msvd_qa").build(tmp_path, media)
    (data / "test_a.json").write_text(json.dumps([{"question_id": 0, "answer": "x"}]))
    with pytest.raises(DataError, match="no answer to 1 of 2 questions, such as 1"):
        list(get_task("msvd_qa").load(data))


@pytest.mark.parametrize(
    ("name", "file", "text", "said"),
    [
        ("charades_sta-original", "charades_sta_test.txt", "A 1 2 x\n", "line 1: not 'VIDEO start"),
        ("perceptiontest_val_mc-original", "mc_question_valid.json", "[1]", "not as the benchmark"),
        ("tempcompass_yes_no-original", "questions/yes_no.json", "[1]", "not as the benchmark"),
        ("omnivideobench", "data.json", '[{"video": "x"}]', "film 0 .* no list of questions"),
        ("nextqa_mc-csv", "map_vid_vidorID.json", "3", "no map from ids to names"),
        ("videomme", "videomme/test-00000-of-00001.parquet", "x", "parquet"),
        ("lvbench-original", "video_info.meta.jsonl", '{"key": 1}\n{', "line 2: not JSON"),
        ("world-question", "test.json", '{"a": 1}', "holds a dict where a list"),
    ],
)
def test_annotations_that_cannot_be_read_name_file_and_place(
    name: str, file: str, text: str, said: str, media: Media, tmp_path: Path
) -> None:
    small = mini(name)
    data = small.build(tmp_path, media)
    (data / file).write_text(text)
    with pytest.raises(DataError, match=said):
        list(get_task(small.task).load(data, small.split))
