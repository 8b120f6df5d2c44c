"""What a pool study needs of models: how items fare under each prompt, and how they are scored.

Every prompt reads every item once; a selector reads only what it chooses from. Both are kept in the
journal of scored batches, so that a stopped study goes on. The invariant: an item's utility under a
prompt is what `eval` gives it where that prompt is chosen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax.config import ConfigError, PoolStudy
from idp_jax.evaluation.harness import HarnessLM
from idp_jax.evaluation.harness_tasks import run_harness
from idp_jax.evaluation.journal import Journal
from idp_jax.evaluation.perplexity import token_logprobs
from idp_jax.evaluation.requests import ATTENTION_CELLS
from idp_jax.evaluation.samples import HASH
from idp_jax.evaluation.selection_statistics import log_mean
from idp_jax.evaluation.task_data import task_manager
from idp_jax.inference.buckets import bucket
from idp_jax.jobs.progress import SILENT, Progress
from idp_jax.processes import gather
from idp_jax.recover import Repaired

SEGMENTS = 8  # stretches of a window whose losses are kept apart


@dataclass(frozen=True)
class Answer:
    """One item under one model: log-probabilities of its options, and what counts.

    Attributes:
        gold: the index of the right option.
        right: the harness's accuracy.
        item: the harness's hash of it.
    """

    logprobs: list[float]
    gold: int
    right: float
    item: str


Place = tuple[str, int]  # task and number of the item


def single(repaired: Repaired, prompt: int) -> Repaired:
    """The model with one prompt of its pool, for every input."""
    assert repaired.prefix is not None
    return Repaired(repaired.decoder, repaired.prefix.rows(jnp.asarray([prompt])))


def check_tasks(tasks: Sequence[Any]) -> None:
    """Refuses tasks whose items are no choice among answers, by a ConfigError."""
    for name, task in task_manager().load(list(tasks))["tasks"].items():
        if task.OUTPUT_TYPE != "multiple_choice" or getattr(task, "multiple_input", 0):
            raise ConfigError(
                f"--tasks {name} is no choice among answers behind one text, so a prompt's margin "
                "on it has no meaning; name multiple-choice tasks such as knowledge"
            )


class _Asker(HarnessLM):
    """Keeps what a pool's prompt is chosen from, by item."""

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self.choosers: dict[Place, list[int]] = {}

    def _questions(self, instances):
        found = super()._questions(instances)
        for instance, request in zip(instances, found, strict=True):
            if request is not None and instance.args[0]:
                place = (instance.task_name, instance.doc_id)
                self.choosers[place] = request.chooser or request.context
        return found


def ask(
    repaired: Repaired,
    tokenizer: Any,
    tasks: list[Any],
    settings: PoolStudy,
    max_length: int,
    progress: Progress,
    journal: Journal,
) -> tuple[dict[Place, Answer], dict[Place, list[int]]]:
    """Answers by item under one model, and the tokens that a pool would choose from."""
    model = _Asker(
        repaired,
        tokenizer,
        settings.batch_size,
        max_length,
        seed=settings.seed,
        skip=True,
        progress=progress,
        journal=journal,
    )
    options = {"num_fewshot": settings.num_fewshot, "limit": settings.limit}
    found = run_harness(model, tasks, settings.seed, **options)
    answers = {}
    for task, rows in found["samples"].items():
        for row in rows:
            if row["doc_id"] not in model.refused.get(task, ()):
                answers[task, row["doc_id"]] = _answer(task, row)
    return answers, model.choosers


def _answer(task: str, row: dict[str, Any]) -> Answer:
    logprobs = [float(logprob) for logprob, _ in row["filtered_resps"]]
    if "acc_mutual_info" in row["metrics"]:  # the options again, without a context
        logprobs = logprobs[: len(logprobs) // 2]
    gold = str(row["target"])
    if not gold.isdigit() or int(gold) >= len(logprobs):
        raise ConfigError(
            f"--tasks {task}: item {row['doc_id']} has the answer {gold!r}, not the number of one "
            "of its options; leave this task out"
        )
    return Answer(logprobs, int(gold), float(row["acc"]), row["doc_hash"][:HASH])


def text_limit(models: Sequence[Repaired], tokenizer: Any, asked: int | None) -> int:
    """Text tokens of a row that every model has room for."""
    return min(HarnessLM(model, tokenizer, max_length=asked).max_length for model in models)


def margin(logprobs: Sequence[float], gold: int) -> float:
    """The log-odds of the right option against the likeliest other."""
    others = [value for number, value in enumerate(logprobs) if number != gold]
    return logprobs[gold] - max(others)


@jax.jit
def _token_logprobs(repaired: Repaired, tokens):
    return token_logprobs(repaired, tokens)


def read_windows(
    models: Sequence[Repaired],
    windows: np.ndarray,
    batch_size: int,
    progress: Callable = iter,
    journal: Journal | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Summed log-probabilities of the tokens of windows [N, T], by segment.

    Returns:
        Under each of M models [N, M, S], and of their uniform ensemble [N, S]: the mean of their
        probabilities, token by token. Both float64.

    Raises:
        ValueError: one is no finite number.
    """
    count, journal, found = len(windows), journal or Journal(), []
    for start in progress(range(0, count, batch_size)):
        rows = np.arange(start, start + batch_size)
        batch = windows[np.where(rows < count, rows, 0)]  # one shape, one compilation
        compute = lambda batch=batch: _segments(models, batch)
        found += journal(compute, "segments", SEGMENTS, batch)
    sums = np.asarray(found[:count], np.float64)
    if not np.isfinite(sums).all():
        window = np.argwhere(~np.isfinite(sums))[0][0]
        raise ValueError(f"the loss of window {window} is no finite number under some prompt")
    return sums[:, :-1], sums[:, -1]


def _segments(models: Sequence[Repaired], batch: np.ndarray) -> list:
    """[B][M + 1][S] sums; the last of the models is their ensemble."""
    each = [np.asarray(gather(_token_logprobs(model, batch)), np.float64) for model in models]
    each = np.stack([*each, log_mean(np.stack(each), 0)], 1)
    return np.add.reduceat(each, segment_starts(batch.shape[1] - 1), -1).tolist()


def segment_starts(count: int) -> np.ndarray:
    """Where each stretch of `count` predicted tokens begins."""
    return np.cumsum([0, *(len(x) for x in np.array_split(range(count), SEGMENTS) if len(x))])[:-1]


@jax.jit
def choice_scores(repaired: Repaired, ids, mask):
    """The selector's scores [B, M]."""
    return repaired.scores(ids, mask)


def score_inputs(
    repaired: Repaired,
    inputs: Sequence[Sequence[int]],
    batch_size: int,
    name: str = "selector",
    progress: Progress = SILENT,
    journal: Journal | None = None,
) -> np.ndarray:
    """A selector's scores of texts, float64 [N, M].

    Raises:
        ValueError: a score is not a number.
    """
    journal, order = journal or Journal(), np.argsort([-len(row) for row in inputs], kind="stable")
    batches, start = [], 0
    while start < len(order):
        length = bucket(len(inputs[order[start]]))
        size = max(1, min(batch_size, ATTENTION_CELLS // length**2))
        batches.append((order[start : start + size], length, size))
        start += size
    scores: dict[int, list[float]] = {}
    for members, length, size in progress.tracker(name)(batches):
        ids, mask = np.zeros((2, size, length), np.int32)
        for row, member in enumerate(np.resize(members, size)):  # the last batch repeats its rows
            ids[row, : len(inputs[member])], mask[row, : len(inputs[member])] = inputs[member], 1
        compute = lambda ids=ids, mask=mask: np.asarray(
            gather(choice_scores(repaired, ids, mask)), np.float64
        ).tolist()
        scores |= zip(members.tolist(), journal(compute, "choice", ids, mask), strict=False)
    found = np.asarray([scores[number] for number in range(len(inputs))])
    if np.isnan(found).any():
        raise ValueError(f"selector {name} gives scores that are no numbers")
    return found
