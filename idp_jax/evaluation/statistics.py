"""Intervals for the numbers we report, so that chance is not taken for a finding.

Comparisons are paired: two models answer the same items, and whole items are drawn again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import BeforeValidator
from scipy import stats

RESAMPLES = 10_000
_FEW_KINDS = 100
_LARGEST_EXPONENT = math.log(1e300)


def _or(infinity: float) -> BeforeValidator:
    """JSON has no infinity: it is written as null, and read as what it was."""
    return BeforeValidator(lambda value: infinity if value is None else value)


Number = Annotated[float, _or(math.inf)]
Low = Annotated[float, _or(-math.inf)]


@dataclass(frozen=True)
class Estimate:
    """A number and the interval that holds it at `confidence`; of one item alone, no bounds."""

    value: Number
    low: Low
    high: Number
    confidence: float = 0.95

    def excludes(self, value: float) -> bool:
        """Whether the interval lies wholly on one side of `value`."""
        return not self.low <= value <= self.high


def accuracy_interval(correct: Sequence[float], confidence: float = 0.95) -> Estimate:
    """An accuracy with its Wilson interval.

    Args:
        correct: 0 or 1 for every item.

    Raises:
        ValueError: no items, or a value other than 0 and 1.
    """
    right = _items(correct)
    if not np.isin(right, (0, 1)).all():
        bad = right[~np.isin(right, (0, 1))][0]
        raise ValueError(f"an item is right (1) or wrong (0), got {bad}")
    test = stats.binomtest(int(right.sum()), len(right))
    interval = test.proportion_ci(confidence, method="wilson")
    return Estimate(float(right.mean()), float(interval.low), float(interval.high), confidence)


class Blocks(NamedTuple):
    """What is drawn again as a whole: items, or clusters of them.

    Attributes:
        sums: of the differences of the items of each block, float64 [blocks].
        sizes: how many items each has, float64 [blocks].
    """

    sums: np.ndarray
    sizes: np.ndarray

    @property
    def mean(self) -> float:
        """The mean difference of an item."""
        return float(self.sums.sum() / self.sizes.sum())


def paired_blocks(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[str] | None = None
) -> Blocks:
    """The differences second - first of the same items.

    Args:
        first, second: one score per item, in the same order.
        clusters: what each item belongs to; None lets every item stand for itself.

    Raises:
        ValueError: no items, or a different number of them.
    """
    difference = _same_items(first, second)
    if clusters is None:
        return Blocks(difference, np.ones_like(difference))
    if len(clusters) != len(difference):
        raise ValueError(f"{len(difference)} items, and clusters of {len(clusters)}")
    _, owners = np.unique(np.asarray(clusters), return_inverse=True)
    return Blocks(np.bincount(owners, difference), np.bincount(owners).astype(np.float64))


def redrawn(blocks: Blocks, rng: np.random.Generator) -> np.ndarray:
    """The mean differences of RESAMPLES draws of as many blocks, float64 [RESAMPLES].

    Where blocks are of few kinds, as right and wrong answers are, it is drawn how many of each
    there are: the same distribution, in no time.
    """
    kinds, counts = np.unique(np.stack(blocks), axis=1, return_counts=True)
    if len(counts) <= _FEW_KINDS:
        drawn = rng.multinomial(counts.sum(), counts / counts.sum(), size=RESAMPLES)
        return (drawn @ kinds[0]) / (drawn @ kinds[1])
    return _resampled(tuple(blocks), _ratio_of_means, rng, 0.95).bootstrap_distribution


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    clusters: Sequence[str] | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """mean(second) - mean(first) over the same items, with a paired percentile bootstrap interval.

    Args:
        first, second: one score per item, in the same order.
        clusters: what each item belongs to, where clusters are drawn again instead of items.

    Raises:
        ValueError: no items, or a different number of them.
    """
    blocks = paired_blocks(first, second, clusters)
    if len(blocks.sums) == 1:  # one item says nothing of how much others would differ
        return Estimate(blocks.mean, -math.inf, math.inf, confidence)
    drawn = redrawn(blocks, np.random.default_rng(seed))
    low, high = np.quantile(drawn, ((1 - confidence) / 2, (1 + confidence) / 2))
    return Estimate(blocks.mean, float(low), float(high), confidence)


def paired_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate | None:
    """mean(numerators) / mean(denominators) over the same items, with a paired bootstrap interval.

    Returns:
        None where the denominators' mean is not above 0: there is nothing to have a share of.

    Raises:
        ValueError: no items, or a different number of them.
    """
    _same_items(numerators, denominators)
    parts, wholes = _items(numerators), _items(denominators)
    if wholes.mean() <= 0:
        return None
    return _bootstrap((parts, wholes), _ratio_of_means, seed, confidence)


def _ratio_of_means(parts: np.ndarray, wholes: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean(parts, axis) / np.mean(wholes, axis)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """A mean with Student's interval, as of a few seeds; without bounds for a single value.

    Raises:
        ValueError: no values.
    """
    numbers = _items(values)
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return Estimate(mean, -math.inf, math.inf, confidence)
    reach = float(stats.t.ppf((1 + confidence) / 2, len(numbers) - 1))
    reach *= float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return Estimate(mean, mean - reach, mean + reach, confidence)


def exponential(value: float) -> float:
    """exp(value), and infinity where no float holds it: such a perplexity tells nothing."""
    return math.exp(value) if value < _LARGEST_EXPONENT else math.inf


def perplexity_interval(losses: Sequence[float], confidence: float = 0.95) -> Estimate | None:
    """exp(mean) of the losses of windows, with Student's interval of the mean; None for one window.

    Args:
        losses: mean loss of every window (`PerplexityResult.per_window_nll`).

    Raises:
        ValueError: no windows.
    """
    if len(_items(losses)) < 2:
        return None
    found = mean_interval(losses, confidence)
    low, high = exponential(found.low), exponential(found.high)
    return Estimate(exponential(found.value), low, high, confidence)


def perplexity_ratio(
    first: Sequence[float], second: Sequence[float], *, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """perplexity(second) / perplexity(first), with a paired bootstrap interval over windows.

    Args:
        first, second: mean loss of the same windows (`PerplexityResult.per_window_nll`).

    Raises:
        ValueError: no windows, or a different number of them.
    """
    difference = _same_items(first, second)
    found = _bootstrap((difference,), _exponential_of_mean, seed, confidence)
    return replace(found, low=max(found.low, 0.0))


def _exponential_of_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.exp(np.minimum(np.mean(values, axis), _LARGEST_EXPONENT))


def _items(values: Sequence[float]) -> np.ndarray:
    scores = np.asarray(values, np.float64)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"scores must be one number per item, got shape {scores.shape}")
    return scores


def _same_items(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    before, after = _items(first), _items(second)
    if len(before) != len(after):
        raise ValueError(f"paired scores need the same items, got {len(before)} and {len(after)}")
    return after - before


def _bootstrap(
    samples: tuple[np.ndarray, ...], statistic, seed: int, confidence: float
) -> Estimate:
    """A statistic of one or several numbers of every item; whole items are drawn again."""
    value = float(statistic(*samples, axis=-1))
    if len(samples[0]) == 1:  # one item says nothing of how much others would differ
        return Estimate(value, -math.inf, math.inf, confidence)
    # Nothing to draw from; scipy warns of a degenerate distribution.
    if all(np.ptp(values) == 0 for values in samples):
        return Estimate(value, value, value, confidence)
    result = _resampled(samples, statistic, np.random.default_rng(seed), confidence)
    low, high = result.confidence_interval
    return Estimate(value, float(low), float(high), confidence)


def _resampled(samples: tuple[np.ndarray, ...], statistic, rng, confidence: float):
    return stats.bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        paired=len(samples) > 1,
        vectorized=True,
        batch=500,
        rng=rng,
    )
