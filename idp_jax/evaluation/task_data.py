"""Harness tasks on local copies of their data, so that an evaluation needs no network.

The harness's own task files stay as they are (templates, answers, metrics, version); only where the
rows come from is overridden. A data folder is laid out as `<folder of the
task>/{train,validation,test}.jsonl`, each perhaps with `.gz`; BEAR may lie there as its facts (see
`bear`). The invariant: what `local_tasks` returns can be asked, item by item; whatever cannot is
told by file and row before a model is read.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import lm_eval.utils
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from idp_jax.evaluation import bear
from idp_jax.evaluation.task_rows import DataError, Rows, first_failing, one_line, read_rows

BUILT_IN = Path(__file__).parent / "tasks"  # BEAR's templates; the knowledge probe and its data
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
def task_manager(include_path: Path | None = None) -> TaskManager:
    """The harness's tasks, ours and those of a folder by name; made once, of thousands of files."""
    folders: list[str | Path] = [BUILT_IN] if include_path is None else [BUILT_IN, include_path]
    return TaskManager(include_path=folders)


def local_tasks(
    names: Sequence[str],
    data_dir: str | Path | None = None,
    *,
    limit: float | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
) -> list[Any]:
    """Tasks for `lm_eval.simple_evaluate(tasks=...)`.

    Args:
        names: tasks, groups and tags of the harness (see `PAPER_TASKS`), patterns of their names
            such as `mmlu_*`, and the built-in `knowledge` or one of its parts.
        data_dir: folder with one folder of rows per task; None leaves every task's data to the
          harness.
        limit: items of each task that will be asked, or the fraction of them where it is below 1.
        num_fewshot: examples before each item; by default what the task says.
        include_path: folder of further task files; one without a folder in `data_dir` keeps the
            rows that it names.

    Returns:
        Loaded tasks and groups of the harness.

    Raises:
        ValueError: a name that is no task, a task without rows in `data_dir`, or a row that cannot
            be asked.
    """
    _quiet()
    included = None if include_path is None else Path(include_path)
    manager = task_manager(included)
    data = _LocalData(None if data_dir is None else Path(data_dir), included)
    loaded: dict[str, Any] = {}
    for name in _matched(names, manager):
        for found in _load(name, data, manager):
            loaded[found.name if isinstance(found, Group) else found.task_name] = found
    for found in loaded.values():
        for task in found.get_all_tasks() if isinstance(found, Group) else [found]:
            _check_items(task, data.rows.get(task.task_name, {}), limit, num_fewshot)
    manager.load(list(loaded.values()))  # refuses a task that is there twice
    return list(loaded.values())


def count_items(name: str, data_dir: str | Path) -> dict[str, int]:
    """The number of items of each task that a name stands for, on local rows.

    Raises:
        ValueError: as `local_tasks`; no item is looked at.
    """
    _quiet()
    data, manager, found = _LocalData(Path(data_dir), None), task_manager(), {}
    for matched in _matched([name], manager):
        for part in _load(matched, data, manager):
            for task in part.get_all_tasks() if isinstance(part, Group) else [part]:
                found[task.task_name] = len(task.task_docs)  # type: ignore[attr-defined]
    return found


def _quiet() -> None:
    """Keeps what the harness and its data sets would say on their own account to themselves."""
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it reports every setting as a warning


def _matched(names: Sequence[str], manager: TaskManager) -> list[str]:
    """The names of tasks, groups and tags that are asked for, patterns resolved."""
    found = []
    for name in names:
        matched = manager.match_tasks([name]) if set(name) & set("*?[") else [name]
        if not matched or matched[0] not in manager.task_index:
            raise ValueError(
                f"there is no task {name!r}; `lm-eval ls tasks` lists the harness's own"
            )
        found += matched
    return list(dict.fromkeys(found))


def _load(name: str, data: "_LocalData", manager: TaskManager) -> list[Any]:
    """The task or group of a name, or the tasks of a tag."""
    try:
        with data.in_place():
            found: Any = manager.load(name)
    except DataError:
        raise
    except Exception as error:
        raise data.explained(name, error) from error
    root = found["groups"].get(name)
    return [root] if root is not None else list(found["tasks"].values())


class _LocalData:
    """The rows of the tasks that are loaded from a folder.

    Attributes:
        folder: None leaves every task's data to the harness.
        included: folder of task files that may bring their own rows.
        rows: by task and split.
        last: the task whose rows were read last.
    """

    def __init__(self, folder: Path | None, included: Path | None):
        self.folder, self.included = folder, included
        self.rows: dict[str, dict[str, Rows]] = {}
        self.last: Any = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Tasks that the harness makes meanwhile, of groups and tags too, get the folder's rows.

        Those that bring their own rows keep them.
        """
        own = ConfigurableTask.download

        def download(task: Any, dataset_kwargs: dict | None = None, **options: Any) -> None:
            if self.folder is None or self._brings_rows(task, self.folder):
                self.last = None
                own(task, dataset_kwargs, **options)
            else:
                self.fill(task, self.folder)

        with mock.patch.object(ConfigurableTask, "download", download):
            yield

    def _brings_rows(self, task: Any, folder: Path) -> bool:
        source = Path(str((task.config.metadata or {}).get("config_source")))
        if source.is_relative_to(BUILT_IN):
            return task.config.task not in bear.TEMPLATES
        included = self.included is not None and source.is_relative_to(self.included)
        return included and not (folder / str(task.config.task)).is_dir()

    def fill(self, task: Any, folder: Path) -> None:
        """Gives a task its rows, and says which splits there are."""
        name = task.config.task
        rows = _rows(name, folder)
        self.rows[name], self.last = rows, task
        task.dataset = {split: own.dataset() for split, own in rows.items()}
        for key, split in _SPLITS.items():
            setattr(task.config, key, split if split in rows else None)
        task.fewshot_cfg.split = "train" if "train" in rows else None

    def explained(self, name: str, error: Exception) -> ValueError:
        """Why a task could not be made: the row that its file cannot read, or no data to be had."""
        if self.last is None:
            return DataError(
                f"the data of task {name!r} cannot be had ({one_line(error)}); check the network, "
                "or give a local copy with --task-data"
            )
        rows, process = self.rows[self.last.config.task], self.last.config.process_docs
        for own in rows.values() if process is not None else ():
            build = lambda count, own=own: process(own.dataset(count))  # type: ignore[misc]
            bad = first_failing(build, len(own.rows))
            if bad is not None:
                return _refused(own.where(bad), error)
        # What is left of making a task is to look at its first item.
        return _refused(rows["test" if "test" in rows else "validation"].where(0), error)


def _refused(where: str, error: Exception) -> DataError:
    said = one_line(error)
    if not isinstance(error, DataError):
        said = f"the task cannot ask it ({said})"
    return DataError(f"{where}: {said}; mend or remove the row")


def _check_items(
    task: Any, rows: dict[str, Rows], limit: float | None, num_fewshot: int | None
) -> None:
    """Refuses a task with an item that cannot be asked, or an example that cannot be shown."""
    if not isinstance(task, ConfigurableTask):
        return
    docs = task.task_docs
    count = len(docs) if limit is None else limit if limit >= 1 else math.ceil(len(docs) * limit)
    shots = task.config.num_fewshot if task.config.num_fewshot == 0 else num_fewshot
    parts = [(docs, int(count), rows.get("test", rows.get("validation")))]
    if shots or (shots is None and task.config.num_fewshot):
        examples = list(task.fewshot_docs() or ())
        parts.append((examples, len(examples), rows.get("train")))
    environment = lm_eval.utils.env  # it compiles a template anew for every item
    with mock.patch.object(environment, "from_string", cache(environment.from_string)):
        for items, number, own in parts:
            for index, item in enumerate(islice(items, number)):
                try:
                    _check_item(task, item)
                except Exception as error:
                    where = f"item {index} of task {task.task_name}"
                    where = _row_of(task, len(items), index, own) if own is not None else where
                    raise _refused(where, error) from error


def _row_of(task: Any, items: int, index: int, own: Rows) -> str:
    """File and line of an item; a task's file may have left rows out."""
    if items == len(own.rows):
        return own.where(index)

    def build(count: int) -> None:
        if len(task.config.process_docs(own.dataset(count))) > index:
            raise IndexError

    return own.where(first_failing(build, len(own.rows)) or 0)


def _check_item(task: Any, item: Any) -> None:
    question, answer = task.doc_to_text(item), task.doc_to_target(item)
    if bool(task.multiple_input) != isinstance(question, int):
        raise DataError(f"the question is {question!r}, of another kind than in the first item")
    if isinstance(answer, list) and not answer:
        raise DataError("there is no answer")
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    options = task.doc_to_choice(item)
    if not isinstance(options, list | tuple) or not all(isinstance(x, str) and x for x in options):
        raise DataError(f"the options are {options!r}, not a list of texts")
    right = question if task.multiple_input else answer
    for one in right if isinstance(right, list) else [right]:
        known = one in options if isinstance(one, str) else one in range(len(options))
        if not known:
            raise DataError(f"the answer is {one!r}, which is none of the {len(options)} options")


def _rows(name: str, data_dir: Path) -> dict[str, Rows]:
    """A task's rows by split."""
    facts, file = data_dir / "bear", data_dir / name / "test.jsonl"
    if name in bear.TEMPLATES and (facts / bear.FACTS).is_file() and not file.is_file():
        return {"test": bear.bear_rows(facts, bear.TEMPLATES[name])}
    return {split: read_rows(path) for split, path in _files(name, data_dir).items()}


def _files(name: str, data_dir: Path) -> dict[str, Path]:
    """The files of a task's rows by split."""
    folder = data_dir / _FOLDERS.get(name, name)
    files = {}
    for split in _SPLITS.values():
        paths = [folder / f"{split}{end}" for end in (".jsonl", ".jsonl.gz")]
        found = [path for path in paths if path.is_file()]
        if found:
            files[split] = found[0]
    if not {"validation", "test"} & files.keys():
        held = sorted(path.parent.name for path in data_dir.glob("*/*.jsonl*"))
        raise DataError(
            f"task {name!r} has no test or validation rows in {folder}; "
            f"{data_dir} holds {', '.join(dict.fromkeys(held)) or 'no tasks'}"
        )
    return files
