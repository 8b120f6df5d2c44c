"""Local rows behind the harness's own task files."""

import gzip
import json

import pytest
from lm_eval.api.group import Group

from idp_jax.evaluation.task_data import PAPER_TASKS, local_tasks, task_manager
from tests.datasets import DATA, needs_data

ROW = {
    "question": "Is it?",
    "choices": {"text": ["no", "yes"], "label": ["A", "B"]},
    "answerKey": "B",
}


def write_rows(path, count=2, row=ROW):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({**row, "id": str(n)}) + "\n" for n in range(count))
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def test_templates_stay_and_rows_are_ours(tmp_path):
    write_rows(tmp_path / "arc_easy" / "test.jsonl")
    write_rows(tmp_path / "arc_easy" / "train.jsonl.gz", 3)
    (task,) = local_tasks(["arc_easy"], tmp_path)
    own = task_manager().task_index["arc_easy"]
    assert task.config.metadata["config_source"] == str(own.yaml_path)
    assert (task.has_training_docs(), task.has_validation_docs(), task.has_test_docs()) == (
        True,
        False,
        True,
    )
    assert (len(task.training_docs()), len(task.test_docs())) == (3, 2)
    assert task.doc_to_text(task.test_docs()[0]) == "Question: Is it?\nAnswer:"
    task.set_config(key="num_fewshot", value=1)
    task.build_all_requests(limit=1)
    assert task.instances[0].args == (
        "Question: Is it?\nAnswer: yes\n\nQuestion: Is it?\nAnswer:",
        " no",
    )


def test_missing_rows_name_the_folder_and_what_is_there(tmp_path):
    write_rows(tmp_path / "sciq" / "test.jsonl")
    write_rows(tmp_path / "arc_easy" / "train.jsonl")
    with pytest.raises(
        ValueError,
        match=r"'piqa' has no test or validation rows in .*piqa; .* holds arc_easy, sciq",
    ):
        local_tasks(["piqa"], tmp_path)
    with pytest.raises(ValueError, match="'arc_easy' has no test or validation rows"):
        local_tasks(["arc_easy"], tmp_path)
    with pytest.raises(ValueError, match="holds no tasks"):
        local_tasks(["piqa"], tmp_path / "none")


def test_unknown_task_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no task 'arc_eazy'"):
        local_tasks(["arc_eazy"], tmp_path)


@pytest.mark.parametrize("data_dir", [None, "anywhere"])
def test_built_in_tasks_need_no_data(data_dir):
    group, task = local_tasks(["knowledge", "knowledge_arts"], data_dir)
    assert isinstance(group, Group) and group.name == "knowledge"
    assert task.task_name == "knowledge_arts"


@needs_data
@pytest.mark.parametrize("name", [*PAPER_TASKS, "wikitext"])
def test_every_paper_task_makes_requests(name):
    (task,) = local_tasks([name], DATA)
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=2)
    assert {instance.doc_id for instance in task.instances} == {0, 1}
