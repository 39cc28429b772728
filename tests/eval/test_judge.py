"""Judges: a function, and a server on this machine that speaks the protocol and fails at times."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from eval_stand_in import StandIn, Toy, toy_rows, write_toy

from av_llava.errors import DataError, UsageError
from av_llava_eval.judge import FunctionJudge, JudgeError, UrlJudge, judge_run
from av_llava_eval.runner import RunSettings, run
from av_llava_eval.scoring import score_folder, summarise


class Open(Toy):
    """A task whose answers a judge reads."""

    def judge_prompt(self, sample, text):
        return f"{sample.question} Right: {sample.answer}. Said: {text} Reply with 'score: N'."

    def read_verdict(self, verdict):
        name, _, number = verdict.partition(": ")
        return {"judge": int(number) / 5} if name == "score" and number.isdigit() else None


TASK = Open()


@pytest.fixture
def folder(tmp_path):
    data = write_toy(tmp_path / "data", toy_rows(5))
    run(TASK, data, tmp_path / "run", lambda: StandIn(fail={"v0": "oom"}), RunSettings())
    return tmp_path / "run"


def verdict(prompt):
    right, said = prompt.split("Right: ")[1][0], prompt.split("Said: ")[1][0]
    return "score: 5" if right == said else "score: 1"


def test_verdicts_become_metrics_and_leave_the_score_alone(folder):
    scored = score_folder(folder, task=TASK)
    judged = judge_run(scored, FunctionJudge("mine", verdict))
    assert (judged.asked, judged.kept, judged.unreadable, judged.failed) == (12, 0, 0, 0)
    before, after = (summarise(s)["arms"]["main"] for s in (scored, judged.scored))
    right = sum(r["score"] == 1 for r in scored.arms["main"])
    assert after["metrics"]["judge"] == {
        "score": pytest.approx((right + (12 - right) / 5) / 12),
        "n": 12,
    }
    assert after["score"] == before["score"] and before["metrics"] == {}


def test_no_verdict_is_asked_for_twice_but_another_judge_has_its_own(folder):
    scored = score_folder(folder, task=TASK)
    first = judge_run(scored, FunctionJudge("mine", verdict))
    again = judge_run(scored, FunctionJudge("mine", lambda p: pytest.fail("asked again")))
    assert (again.asked, again.kept) == (0, 12) and again.scored.arms == first.scored.arms
    other = judge_run(scored, FunctionJudge("other", lambda p: "score: 0"))
    assert other.asked == 12
    rows = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    assert {r["judge"] for r in rows} == {"mine", "other"} and len(rows) == 24
    assert all(r["prompt"] and r["when"] and r["id"] for r in rows)


def test_what_cannot_be_read_or_had_is_counted_and_no_zero(folder):
    def moody(prompt):
        if "Right: A" in prompt:
            return "I would rather not say"
        if "Right: B" in prompt:
            raise JudgeError("busy")
        return "score: 5"

    scored = score_folder(folder, task=TASK)
    judged = judge_run(scored, FunctionJudge("moody", moody))
    answers = [r["answer"] for r in scored.arms["main"] if r["status"] == "ok"]
    assert judged.unreadable == answers.count("A") > 0
    assert judged.failed == answers.count("B") > 0
    metric = summarise(judged.scored)["arms"]["main"]["metrics"]["judge"]
    assert metric == {"score": 1.0, "n": 12 - answers.count("A") - answers.count("B")}
    later = judge_run(scored, FunctionJudge("moody", lambda p: "score: 5"))
    assert later.asked == judged.failed  # only those are asked again


def test_a_task_without_a_judge(folder):
    with pytest.raises(UsageError, match="asks no judge"):
        judge_run(score_folder(folder, task=Toy()), FunctionJudge("mine", verdict))


def test_a_torn_verdict_is_taken_out_and_a_damaged_one_named(folder):
    scored = score_folder(folder, task=TASK)
    judge_run(scored, FunctionJudge("mine", verdict))
    file = folder / "verdicts.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert judge_run(scored, FunctionJudge("mine", verdict)).asked == 1
    assert len(file.read_bytes().splitlines()) == 12
    file.write_bytes(b"junk\n" + whole)
    with pytest.raises(DataError, match=r"verdicts\.jsonl cannot be read"):
        judge_run(scored, FunctionJudge("mine", verdict))


# -------------------------------------------------------------------- over HTTP


class Server:
    """A judge on loopback; ``replies`` are statuses or texts, used in turn and then ``verdict``."""

    def __init__(self):
        self.requests, self.replies = [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                reply = outer.replies.pop(0) if outer.replies else None
                if isinstance(reply, int):
                    self.send_response(reply)
                    self.end_headers()
                    return
                said = verdict(body["messages"][0]["content"]) if reply is None else None
                text = reply or json.dumps({"choices": [{"message": {"content": said}}]})
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def test_a_server_is_asked_as_openai_is(folder, server):
    judge = UrlJudge(server.url, "judge-1", key="secret")
    judged = judge_run(score_folder(folder, task=TASK), judge)
    assert (judged.asked, judged.failed) == (12, 0)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "judge-1" and body["temperature"] == 0
    assert judged.judge == f"judge-1 at 127.0.0.1:{server.http.server_port}"
    kept = (folder / "verdicts.jsonl").read_text()
    assert "secret" not in kept + repr(judge)


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(server):
    judge = UrlJudge(server.url, "judge-1", pause_s=0.01)
    server.replies = [503, 429]
    assert judge("Right: A. Said: A") == "score: 5"
    assert len(server.requests) == 3
    server.replies = [401]
    with pytest.raises(JudgeError, match="401"):
        judge("Right: A. Said: A")
    assert len(server.requests) == 4
    server.replies = [500] * 9
    with pytest.raises(JudgeError, match="500"):
        judge("Right: A. Said: A")
    assert len(server.requests) == 9
    server.replies = ["<html>"]
    with pytest.raises(JudgeError, match="no chat completion"):
        judge("Right: A. Said: A")


def test_an_address_that_is_none_and_nobody_there():
    for wrong in (("localhost:1/v1", "m"), ("http://localhost/v1", "")):
        with pytest.raises(UsageError):
            UrlJudge(*wrong)
    with pytest.raises(JudgeError, match="gives no verdict"):
        UrlJudge("http://127.0.0.1:9/v1", "m", attempts=2, pause_s=0.01, timeout_s=2)("x")
