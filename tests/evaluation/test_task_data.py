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
    (group,) = local_tasks(["knowledge"], data_dir, limit=2)
    assert isinstance(group, Group) and group.name == "knowledge"
    (task,) = local_tasks(["knowledge_arts"], data_dir, limit=2)
    assert task.task_name == "knowledge_arts"
    with pytest.raises(ValueError, match="'knowledge_arts': found in both 'knowledge' and"):
        local_tasks(["knowledge", "knowledge_arts"], data_dir, limit=2)


@pytest.mark.parametrize("asked", ["ai2_arc", "arc_eas?"])
def test_tags_and_patterns_are_their_tasks(tmp_path, asked):
    for name in ("arc_easy", "arc_challenge"):
        write_rows(tmp_path / name / "test.jsonl", 4)
    names = [task.task_name for task in local_tasks([asked, "arc_easy"], tmp_path)]
    assert names == (["arc_challenge", "arc_easy"] if asked == "ai2_arc" else ["arc_easy"])


def test_every_task_of_a_group_has_its_rows(tmp_path):
    row = {"question": "Q", "subject": "s", "choices": ["1", "2", "3", "4"], "answer": 2}
    group = "mmlu_humanities"
    with pytest.raises(ValueError, match=r"'mmlu_\w+' has no test or validation rows") as error:
        local_tasks([group], tmp_path)
    for _ in range(20):  # one folder after the other, as the message asks for it
        name = str(error.value).split("'")[1]
        write_rows(tmp_path / name / "test.jsonl", 2, row)
        write_rows(tmp_path / name / "validation.jsonl", 2, row)
        try:
            (loaded,) = local_tasks([group], tmp_path, limit=0.5)
            break
        except ValueError as missing:
            error = pytest.ExceptionInfo.from_exception(missing)
    tasks = loaded.get_all_tasks()
    assert len(tasks) > 5 and {len(task.test_docs()) for task in tasks} == {2}


@needs_data
@pytest.mark.parametrize("name", [*PAPER_TASKS, "wikitext"])
def test_every_paper_task_makes_requests(name):
    (task,) = local_tasks([name], DATA)
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=2)
    assert {instance.doc_id for instance in task.instances} == {0, 1}
