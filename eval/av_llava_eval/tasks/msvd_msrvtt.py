"""MSVD-QA and MSRVTT-QA: one-word answers about short films, in Video-ChatGPT's files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from av_llava_eval.annotations import find_medium
from av_llava_eval.open_ended import OpenTask, read_pairs
from av_llava_eval.sample import Sample
from av_llava_eval.task import Doc, register


@register
class MSVDQA(OpenTask):
    """Films of a few seconds."""

    name = "msvd_qa"
    title = "MSVD-QA"
    needs = ("test_q.json + test_a.json", "videos/NAME.avi")
    groupings = ("first_word",)
    folders = ("videos", "YouTubeClips", "video", "")

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """The two JSON files joined."""
        return read_pairs(root)

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """Grouped by what, who, how, when, where."""
        question = doc["question"].strip().rstrip("?")
        return Sample(
            id=str(doc["question_id"]),
            group=str(doc["video_name"]),
            question=question.capitalize() + "?",
            answer=str(doc["answer"]),
            video=find_medium(root, self.folders, str(doc["video_name"])),
            meta={"first_word": question.split(" ")[0].lower()},
        )


@register
class MSRVTTQA(MSVDQA):
    """Films of ten to thirty seconds."""

    name = "msrvtt_qa"
    title = "MSRVTT-QA"
    needs = ("test_q.json + test_a.json", "videos/NAME.mp4 or videos/all/NAME.mp4")
    folders = ("videos/all", "videos", "TestVideo", "")
