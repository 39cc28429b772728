"""The functions that the tiny task names."""


def doc_to_visual(doc):
    """The video of a question."""
    return [doc["video"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    """The question."""
    return doc["question"]


def process_results(doc, results):
    """Whether the answer is the expected one."""
    return {"match": float(results[0].strip() == doc["answer"])}
