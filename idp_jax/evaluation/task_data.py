"""Harness tasks on local copies of their data, so that an evaluation needs no network.

The harness's own task files stay as they are (templates, answers, metrics, version); only where the
rows come from is overridden. A data folder is laid out as `<folder of the
task>/{train,validation,test}.jsonl`, each perhaps with `.gz`.
"""

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

BUILT_IN = Path(__file__).parent / "tasks"  # the knowledge probe, which carries its own data
PAPER_TASKS = (
    "arc_easy",
    "arc_challenge",
    "sciq",
    "webqs",
    "triviaqa",
    "piqa",
    "hellaswag",
    "lambada_openai",
    "winogrande",
    "commonsense_qa",
)
_FOLDERS = {"wikitext": "wikitext2"}  # where the folder is not named as the task is
_SPLITS = {"training_split": "train", "validation_split": "validation", "test_split": "test"}


@cache
def task_manager() -> TaskManager:
    """The harness's tasks and ours by name; made once, since it reads thousands of files."""
    return TaskManager(include_path=BUILT_IN)


def local_tasks(names: Sequence[str], data_dir: str | Path | None = None) -> list[Any]:
    """Tasks for `lm_eval.simple_evaluate(tasks=...)`.

    Args:
        names: harness tasks (see `PAPER_TASKS`), and the built-in `knowledge` or one of its parts.
        data_dir: folder with one folder of rows per task; None leaves every task's data to the
          harness.

    Returns:
        Loaded tasks and groups of the harness.

    Raises:
        ValueError: a name that is no task, or a task without rows in `data_dir`.
    """
    manager = task_manager()
    logging.getLogger("lm_eval.api.task").addFilter(_no_advice_on_custom_data)
    loaded = []
    for name in names:
        entry = manager.task_index.get(name)
        if entry is None:
            raise ValueError(
                f"there is no task {name!r}; `lm-eval ls tasks` lists the harness's own"
            )
        built_in = entry.yaml_path is not None and Path(entry.yaml_path).is_relative_to(BUILT_IN)
        if data_dir is None or built_in:
            found: Any = manager.load(name)
            loaded += list(found["groups"].values()) or list(found["tasks"].values())
        else:
            override = _local_rows(name, Path(data_dir))
            group = {"group": "local", "task": [{"task": name, **override}]}
            loaded += manager.load(group)["tasks"].values()
    return loaded


def _local_rows(name: str, data_dir: Path) -> dict[str, Any]:
    """The keys of a task file that say where its rows come from."""
    folder = data_dir / _FOLDERS.get(name, name)
    files = {}
    for split in _SPLITS.values():
        paths = [folder / f"{split}{end}" for end in (".jsonl", ".jsonl.gz")]
        found = [str(path) for path in paths if path.is_file()]
        if found:
            files[split] = found[0]
    if not {"validation", "test"} & files.keys():
        held = sorted(path.parent.name for path in data_dir.glob("*/*.jsonl*"))
        raise ValueError(
            f"task {name!r} has no test or validation rows in {folder}; "
            f"{data_dir} holds {', '.join(dict.fromkeys(held)) or 'no tasks'}"
        )
    splits = {key: split if split in files else None for key, split in _SPLITS.items()}
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "fewshot_split": splits["training_split"],
        **splits,
    }


def _no_advice_on_custom_data(record: logging.LogRecord) -> bool:
    """Drops the harness's advice on `--metadata`, which it gives for every task of our own."""
    return "Custom kwargs can be passed" not in record.getMessage()
