"""docs/tasks.md says what the registry says."""

from __future__ import annotations

from eval_tasks_page import PAGE, page

from av_llava_eval import get_task, task_names


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/eval_tasks_page.py"


def test_every_task_says_what_it_is() -> None:
    for name in task_names():
        task = get_task(name)
        assert task.name == name and task.title and task.needs and task.metric
        assert task.headline == "micro" or task.headline.partition(":")[2] in task.groupings
        assert len(set(task.splits)) == len(task.splits) and task.styles[0] == "default"
        assert (task.__doc__ or "").strip().endswith(".")
    titles = [get_task(name).title for name in task_names()]
    assert len(set(titles)) == len(titles)
