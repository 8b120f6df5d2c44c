"""One call that runs harness tasks on a model and returns plain numbers.

Everything that a later comparison needs comes back with the scores: intervals, and of every item
its hash, its score and the pool's prompt. An item that cannot be scored is no wrong answer: it is
left out of every metric, and named.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import lm_eval
import numpy as np
from lm_eval.api.group import Group

from idp_jax.evaluation.harness import HarnessLM
from idp_jax.evaluation.journal import Journal
from idp_jax.evaluation.results import ACCURACIES, TaskResult, TaskScores
from idp_jax.evaluation.samples import HASH, item_facts, item_scores
from idp_jax.evaluation.statistics import accuracy_interval, exponential
from idp_jax.evaluation.task_data import local_tasks, task_manager
from idp_jax.jobs.progress import SILENT, Progress
from idp_jax.models import Decoder
from idp_jax.recover import Repaired


def evaluate(
    repaired: Repaired | Decoder,
    tokenizer: Any,
    *,
    tasks: Sequence[Any],
    task_data: str | Path | None = None,
    limit: float | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
    journal: Journal | None = None,
) -> TaskScores:
    """Scores a model on harness tasks.

    Args:
        tokenizer: a transformers tokenizer.
        tasks: names of harness tasks, groups, tags and patterns, and the built-in `knowledge`; or
            what `local_tasks` loaded.
        task_data: folder with local rows, see `local_tasks`; None leaves them to the harness.
        limit: only the first items of every task, or this fraction of them where it is below 1.
        batch_size: rows at a time; it does not change scores.
        num_fewshot: examples before every question; default is the task's own.
        max_length: text tokens of a row at most; default is the model's.
        seed: of few-shot examples and sampled answers.
        progress: of scoring and generation.
        journal: of batches that are known already.

    Raises:
        ValueError: an unknown task, one without rows in `task_data`, a row that cannot be asked, or
            a task of which no item can be scored.
    """
    names = [task for task in tasks if isinstance(task, str)]
    loaded = [task for task in tasks if not isinstance(task, str)]
    loaded += local_tasks(names, task_data, limit=limit, num_fewshot=num_fewshot)
    model = HarnessLM(
        repaired,
        tokenizer,
        batch_size,
        max_length,
        seed=seed,
        skip=True,
        progress=progress,
        journal=journal,
    )
    found = run_harness(model, loaded, seed, num_fewshot=num_fewshot, limit=limit)
    rows = {task: _task(found, task, model) for task in found["samples"]}
    groups = {name: _metrics(row) for name, row in found.get("groups", {}).items()}
    main = [value for value in (_main(task, rows, groups) for task in loaded) if value is not None]
    mean = float(np.mean(main)) if main else None
    return TaskScores(tasks=rows, groups=groups, mean_accuracy=mean)


def _main(asked: Any, rows: dict[str, TaskResult], groups: dict[str, dict]) -> float | None:
    """The main metric of a task or group; a group without one of its own has its members' mean."""
    if not isinstance(asked, Group):
        return _first(rows[asked.task_name].metrics, ACCURACIES)
    own = _first(groups.get(asked.name, {}), ACCURACIES)
    parts = [_main(part, rows, groups) for part in asked] if own is None else [own]
    known = [value for value in parts if value is not None]
    return float(np.mean(known)) if known else None


def _first(values: dict[str, float], names: Sequence[str]) -> float | None:
    return next((values[name] for name in names if name in values), None)


def run_harness(model: HarnessLM, tasks: list, seed: int, **options: Any) -> dict[str, Any]:
    """The harness's own evaluation, without what it prints on its own account."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it reports every setting as a warning
    # It asks git for the commit of the current folder, which need not be a checkout, and draws a
    # bar for each task while it writes the prompts.
    with (
        mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None),
        mock.patch("lm_eval.api.task.tqdm", lambda rows, **_: rows),
        mock.patch("lm_eval.api.metrics.math", _MATH),
        _without_refused(tasks),
    ):
        # The harness's decorators hide its signature from type checkers.
        return cast(Any, lm_eval.simple_evaluate)(
            model=model,
            tasks=tasks,
            task_manager=task_manager(),
            bootstrap_iters=0,  # intervals are ours
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            **options,
        )


# The harness's perplexities are exp of a mean loss, which raises an error where it is large.
_MATH = SimpleNamespace(**{**vars(math), "exp": exponential})


@contextmanager
def _without_refused(loaded: Sequence[Any]) -> Iterator[None]:
    """Leaves items whose log-probabilities are no numbers out of every metric of their tasks."""
    with ExitStack() as stack:
        for task in task_manager().load(list(loaded))["tasks"].values():
            scored = _scored_only(task.process_results)
            stack.enter_context(mock.patch.object(task, "process_results", scored))
        yield


def _scored_only(process: Callable) -> Callable:
    """A task's function from an item's responses to its metrics; none where one is no number."""

    def processed(item: Any, responses: Any) -> dict[str, Any]:
        first = [x[0] if isinstance(x, tuple | list) and x else x for x in responses]
        finite = all(math.isfinite(x) for x in first if isinstance(x, float))
        return process(item, responses) if finite else {}

    return processed


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    """A task's or group's metrics by name; one that is no number over its items is left out.

    The harness names them `metric,filter`. Those of a task's first filter, which is the only one
    of most tasks, lose it.
    """
    named: dict[str, Any] = {}
    for key, value in row.items():
        name, comma, _ = key.partition(",")
        if comma and not name.endswith("_stderr"):
            named[key if name in named else name] = value
    numbers = {k: float(v) for k, v in named.items() if isinstance(v, int | float | np.number)}
    return {name: value for name, value in numbers.items() if not math.isnan(value)}


def _task(found: dict, task: str, model: HarnessLM) -> TaskResult:
    asked = sorted(found["samples"][task], key=lambda row: row["doc_id"])
    refused = model.refused.get(task, {})
    rows = [row for row in asked if row["doc_id"] not in refused]
    if not rows:
        item, reason = next(iter(refused.items()))
        raise ValueError(f"no item of task {task} can be scored; item {item}: {reason}")
    metrics, samples = _metrics(found["results"][task]), item_scores(rows)
    binary = {name: v for name, v in samples.items() if name in metrics and set(v) <= {0.0, 1.0}}
    intervals = {name: accuracy_interval(values) for name, values in binary.items()}
    items = [row for row in rows if row["filter"] == rows[0]["filter"]]
    choices = model.choices.get(task)
    prompts = None if choices is None else [choices.get(row["doc_id"], []) for row in items]
    return TaskResult(
        metrics=metrics,
        interval={name: (e.low, e.high) for name, e in intervals.items()},
        items=len(items),
        num_fewshot=found["n-shot"][task],
        version=found["versions"][task],
        samples=samples,
        documents=[row["doc_hash"][:HASH] for row in items],
        choices=None if prompts is None else _counted(prompts, model),
        prompts=prompts,
        refused=refused,
        **item_facts(items),
    )


def _counted(prompts: list[list[int]], model: HarnessLM) -> list[int]:
    """How often each prompt of the pool was chosen."""
    prefix = model.repaired.prefix
    size = 0 if prefix is None else prefix.batch
    return np.bincount([choice for item in prompts for choice in item], minlength=size).tolist()
