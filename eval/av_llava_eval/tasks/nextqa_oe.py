"""NExT-QA, open-ended: answers of a few words.

The published metric, WUPS, needs WordNet. Put its dictionary (index.noun, data.noun, … as in
Debian's wordnet-base) into ``wordnet/`` beside ``NExTVideo``, and a WUPS is given too (see
``reading.wups`` for how it differs); without it exact match, containment and overlap of words are.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from av_llava_eval.annotations import find_file, read_rows
from av_llava_eval.mcq import clean
from av_llava_eval.open_ended import OpenTask, expected
from av_llava_eval.reading import wups
from av_llava_eval.sample import Sample
from av_llava_eval.task import Doc, register
from av_llava_eval.tasks.nextqa import KINDS, find_video


@register
class NextQAOpen(OpenTask):
    """Short answers, some with a second one that is right too."""

    name = "nextqa_oe"
    title = "NExT-QA (open-ended)"
    needs = ("OE/test-*.parquet or test.csv", "NExTVideo/VIDEO.mp4", "wordnet/ for WUPS")
    splits = ("test", "val")
    groupings = ("kind", "type")
    ending = "Answer with a short phrase or sentence."

    def docs(self, root: Path, split: str) -> Iterable[Doc]:
        """Rows of the parquet or CSV file."""
        named = [f"{f}{split}{e}" for f in ("OE/", "oe/", "") for e in ("-*.parquet", ".csv")]
        return read_rows(find_file(root, *named))

    def sample(self, doc: Doc, index: int, root: Path) -> Sample:
        """Question ids count from 0 in each video."""
        return Sample(
            id=f"{doc['video']}_{doc['qid']}",
            group=str(doc["video"]),
            question=doc["question"].strip().rstrip("?") + "?",
            answer=doc["answer"],
            video=find_video(root, doc["video"]),
            meta={
                "type": doc["type"],
                "kind": KINDS.get(doc["type"][:1], "other"),
                "also_right": doc.get("additional_ref_answer") or None,
            },
        )

    def extra_metrics(self, text: str, sample: Sample) -> dict[str, float]:
        """Also WUPS, where WordNet is there."""
        out = super().extra_metrics(text, sample)
        words = wups.beside(sample.video)
        if words is not None:
            exact = sample.meta["type"] in wups.EXACT
            scores = [wups.wups(clean(text or ""), e, words, exact) for e in expected(sample)]
            out["wups"] = max(scores)
        return out
