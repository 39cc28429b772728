"""Shared by the tests of the evaluation."""

from __future__ import annotations

import pytest

from av_llava_eval import task


@pytest.fixture(autouse=True)
def _own_tasks():
    """Forget the tasks that a test registers, so that no other test meets them."""
    task.task_names()
    known = dict(task.TASKS)
    yield
    task.TASKS.clear()
    task.TASKS.update(known)
