"""From measurements to a sweep's rows: shares, intervals and comparisons, without any model.

Of several seeds the mean is taken window by window and item by item, so that an interval over
windows or items is of the recipe and not of one lucky seed. The invariant: everything is paired;
differences are of the same windows and items.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from idp_jax.config import ConfigError
from idp_jax.evaluation.results import VariantResult
from idp_jax.evaluation.statistics import (
    Estimate,
    accuracy_interval,
    exponential,
    mean_interval,
    paired_difference,
    paired_ratio,
    perplexity_ratio,
)
from idp_jax.evaluation.sweep_results import Baseline, Control, RecipeResult


class Measured(NamedTuple):
    """One model as it was measured: on tasks and reported text, and on the second text."""

    first: VariantResult
    second: VariantResult | None


class Scores(NamedTuple):
    """One model, or the mean of several seeds of a repair.

    Attributes:
        windows, second: the mean loss of each window of the two texts, float64 [W].
        items: by task asked for, the score of each item, float64 [N].
        digests: of the two texts.
    """

    windows: np.ndarray
    second: np.ndarray | None
    items: dict[str, np.ndarray]
    digests: tuple[str, ...]

    @classmethod
    def of(cls, measured: Sequence[Measured], tasks: Sequence[str]) -> "Scores":
        """The mean of some measurements.

        Args:
            tasks: those asked for; of a group such as `knowledge`, the items of all its parts.
        """
        found = [_one(each, tasks) for each in measured]
        for other in found[1:]:
            _check_same(found[0], other)
        mean = lambda rows: np.mean(rows, axis=0)
        second = None
        if found[0].second is not None:
            second = mean([each.second for each in found])
        items = {task: mean([each.items[task] for each in found]) for task in found[0].items}
        return cls(mean([each.windows for each in found]), second, items, found[0].digests)


def _one(measured: Measured, tasks: Sequence[str]) -> Scores:
    texts = [each.perplexity for each in measured if each is not None]
    losses = [np.asarray(text.per_window_nll) for text in texts if text is not None]
    digests = tuple(text.digest for text in texts if text is not None)
    second = losses[1] if len(losses) > 1 else None
    return Scores(losses[0], second, _items(measured.first, tasks), digests)


def _items(variant: VariantResult, tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """By task asked for, its items' scores; those of a group are its parts', whose names it begins.

    What is asked for by another name (a tag, a pattern) is found under its own tasks' names.
    """
    found, left = {}, dict(variant.tasks)
    for name in sorted(tasks, key=len, reverse=True):
        parts = [task for task in sorted(left) if task == name or task.startswith(f"{name}_")]
        rows = [left.pop(part) for part in parts]
        scores = [row.samples[row.accuracy] for row in rows if row.accuracy]
        if scores:
            found[name] = np.concatenate(scores)
    rest = {name: row.samples[row.accuracy] for name, row in left.items() if row.accuracy}
    order = [name for name in tasks if name in found]
    return {name: found[name] for name in order} | {k: np.asarray(v) for k, v in rest.items()}


def _check_same(first: Scores, second: Scores) -> None:
    sizes = [{task: len(rows) for task, rows in each.items.items()} for each in (first, second)]
    if first.digests != second.digests or sizes[0] != sizes[1]:
        raise ConfigError("measurements of other text or items cannot be paired; measure all again")


def baseline(name: str, scores: Scores, seed: int) -> Baseline:
    """The row of a model without repair."""
    second = None if scores.second is None else _perplexity(scores.second)
    accuracy = {task: _accuracy(rows, seed) for task, rows in scores.items.items()}
    return Baseline(name, _perplexity(scores.windows), second, accuracy)


def _perplexity(losses: np.ndarray) -> float | None:
    value = exponential(float(losses.mean()))
    return value if math.isfinite(value) else None


def _accuracy(items: np.ndarray, seed: int) -> Estimate:
    """Wilson's interval where items are right or wrong; of a mean over seeds, a bootstrap's."""
    if np.isin(items, (0, 1)).all():
        return accuracy_interval(items.tolist())
    return paired_difference(np.zeros_like(items).tolist(), items.tolist(), seed=seed)


def measured_recipe(
    row: RecipeResult,
    finals: Sequence[Measured],
    dense: Scores,
    bare: Scores,
    reference: Scores | None,
    tasks: Sequence[str],
    seed: int,
) -> RecipeResult:
    """A recipe's row with what its seeds measured.

    Args:
        row: with its trials.
        finals: of each seed that was trained to the end.
        dense, bare: the uncompressed and the compressed model.
        reference: the recipe that it is compared with; None for that itself.
    """
    if not finals:
        return row
    scores = Scores.of(finals, tasks)
    for other in (dense, bare):
        _check_same(scores, other)
    lost = bare.windows - dense.windows
    gains = [bare.windows - Scores.of([final], tasks).windows for final in finals]
    shares = [float(gain.mean() / lost.mean()) for gain in gains] if lost.mean() > 0 else []
    against = None
    if reference is not None:
        against = paired_ratio(
            (reference.windows - scores.windows).tolist(), lost.tolist(), seed=seed
        )
    gained = (bare.windows - scores.windows).tolist()
    found = baseline("", scores, seed)
    return replace(
        row,
        shares=shares,
        share=mean_interval(shares) if shares else None,
        share_windows=paired_ratio(gained, lost.tolist(), seed=seed),
        against=against,
        perplexity=found.perplexity,
        second_perplexity=found.second_perplexity,
        second_ratio=_ratio(bare.second, scores.second, seed),
        accuracy=found.accuracy,
        accuracy_change=_changes(bare, scores, seed),
    )


def _changes(before: Scores, after: Scores, seed: int) -> dict[str, Estimate]:
    """Differences of accuracy by task, paired over items."""
    return {
        task: paired_difference(before.items[task].tolist(), rows.tolist(), seed=seed)
        for task, rows in after.items.items()
    }


def control_of(measured: Measured, dense: Scores, tasks: Sequence[str], seed: int) -> Control:
    """What a recipe changes beside the uncompressed model."""
    scores = Scores.of([measured], tasks)
    _check_same(scores, dense)
    ratio = _ratio(dense.windows, scores.windows, seed)
    assert ratio is not None
    second = _ratio(dense.second, scores.second, seed)
    return Control(ratio, second, _changes(dense, scores, seed))


def _ratio(before: np.ndarray | None, after: np.ndarray | None, seed: int) -> Estimate | None:
    if before is None or after is None:
        return None
    return perplexity_ratio(before.tolist(), after.tolist(), seed=seed)
