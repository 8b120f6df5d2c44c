"""One call that runs harness tasks on a model and returns plain numbers.

Everything that a later comparison needs comes back with the scores: intervals, and of every item
its hash and its score.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import datasets
import lm_eval
import numpy as np

from idp_jax.evaluation.harness import HarnessLM
from idp_jax.evaluation.results import ACCURACIES, TaskResult, TaskScores
from idp_jax.evaluation.statistics import accuracy_interval
from idp_jax.evaluation.task_data import local_tasks, task_manager
from idp_jax.jobs.progress import SILENT, Progress
from idp_jax.models import Decoder
from idp_jax.recover import Repaired

_HASH = 16  # digits of the harness's hash of an item that are kept


def evaluate(
    repaired: Repaired | Decoder,
    tokenizer: Any,
    *,
    tasks: Sequence[str],
    task_data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> TaskScores:
    """Scores a model on harness tasks.

    Args:
        tokenizer: a transformers tokenizer.
        tasks: harness tasks, and the built-in `knowledge`.
        task_data: folder with local rows, see `local_tasks`; None leaves them to the harness.
        limit: only the first items of every task.
        batch_size: rows at a time; it does not change scores.
        num_fewshot: examples before every question; default is the task's own.
        max_length: text tokens of a row at most; default is the model's.
        seed: of few-shot examples and sampled answers.
        progress: of scoring and generation.

    Raises:
        ValueError: an unknown task, or one without rows in `task_data`.
    """
    loaded = local_tasks(tasks, task_data)
    model = HarnessLM(repaired, tokenizer, batch_size, max_length, seed=seed, progress=progress)
    found = _run_harness(model, loaded, seed, num_fewshot=num_fewshot, limit=limit)
    histograms = _histograms(model)
    rows = {task: _task(found, task, histograms.get(task)) for task in found["samples"]}
    main = [_first(row.metrics, ACCURACIES) for row in rows.values()]
    main = [value for value in main if value is not None]
    return TaskScores(
        tasks=rows,
        groups={name: _metrics(row) for name, row in found.get("groups", {}).items()},
        mean_accuracy=float(np.mean(main)) if main else None,
    )


def _first(values: dict[str, float], names: Sequence[str]) -> float | None:
    return next((values[name] for name in names if name in values), None)


def _run_harness(model: HarnessLM, tasks: list, seed: int, **options: Any) -> dict[str, Any]:
    """The harness's own evaluation, without what it prints on its own account."""
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it reports every setting as a warning
    # It asks git for the commit of the current folder, which need not be a checkout, and draws a
    # bar for each task while it writes the prompts.
    with (
        mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None),
        mock.patch("lm_eval.api.task.tqdm", lambda rows, **_: rows),
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


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    """The harness names metrics `metric,filter`; a task of ours has one filter."""
    named = {key.split(",")[0]: value for key, value in row.items() if "," in key}
    numbers = {k: v for k, v in named.items() if isinstance(v, int | float | np.number)}
    return {k: float(v) for k, v in numbers.items() if not k.endswith("_stderr")}


def _item_scores(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """By metric one number per item; metrics that only exist over a whole text are left out."""
    scores = {name: [row[name] for row in rows] for name in rows[0]["metrics"]}
    number = (int, float, np.number, np.bool_)
    return {
        name: [float(value) for value in values]
        for name, values in scores.items()
        if all(isinstance(value, number) for value in values)
    }


def _task(found: dict, task: str, choices: list[int] | None) -> TaskResult:
    items = sorted(found["samples"][task], key=lambda row: row["doc_id"])
    metrics, samples = _metrics(found["results"][task]), _item_scores(items)
    binary = {name: v for name, v in samples.items() if name in metrics and set(v) <= {0.0, 1.0}}
    intervals = {name: accuracy_interval(values) for name, values in binary.items()}
    return TaskResult(
        metrics=metrics,
        interval={name: (e.low, e.high) for name, e in intervals.items()},
        items=found["n-samples"][task]["effective"],
        num_fewshot=found["n-shot"][task],
        version=found["versions"][task],
        samples=samples,
        documents=[row["doc_hash"][:_HASH] for row in items],
        choices=choices,
    )


def _histograms(model: HarnessLM) -> dict[str, list[int]]:
    prefix = model.repaired.prefix
    size = 0 if prefix is None else prefix.batch
    return {
        task: np.bincount(choices, minlength=size).tolist()
        for task, choices in model.choices.items()
    }
