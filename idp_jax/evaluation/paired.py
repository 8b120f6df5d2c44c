"""Tests of paired differences: is there one, is there none that matters, what could be seen at all.

Everything stands on blocks: items, or clusters of items that are not independent (questions of one
relation, say), which are drawn again, or have their signs turned, as a whole. Several tasks have
the same weight each, however many items they have. The invariant: "no difference" is said by a test
of equivalence alone, never by a test of difference that finds nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from scipy import stats

from idp_jax.evaluation.statistics import RESAMPLES, Blocks, Estimate, redrawn

LEVEL = 0.05  # of every test, two-sided; an equivalence is claimed at the same
POWER = 0.8
_BATCH = 1_000  # of the sign flips, so that those of many items fit in memory

Verdict = Literal["better", "worse", "equivalent", "undecided"]


@dataclass(frozen=True)
class TaskTest:
    """What may be said of two variants on one task.

    Attributes:
        metric: what is compared.
        items, clusters: how many; clusters are None where every item stands for itself.
        first, second: the means of the metric.
        losses, gains: items right in the first alone, and in the second alone; None of a metric
            that is not right or wrong.
        p_value: of no difference. Exact McNemar, of clusters and other metrics by turned signs.
        adjusted: the same after Holm, over the tasks of the comparison.
        equivalence: of a difference beyond the margin (TOST), after Holm; None without a margin,
            of metrics that are no shares.
        smallest: the difference that so many items show with a power of 80 %, at the share of items
            that differ here; None where none does.
        chance: the metric of guessing; None where it is not known.
        at_chance: the first's interval does not lie above chance, so the task shows nothing.
        same_prompts: whether both read the same prompts; None where that is not known.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    metric: str
    items: int
    clusters: int | None
    first: float
    second: float
    losses: int | None
    gains: int | None
    p_value: float
    adjusted: float
    equivalence: float | None
    smallest: float | None
    chance: float | None
    at_chance: bool
    same_prompts: bool | None
    verdict: Verdict


@dataclass(frozen=True)
class PooledTest:
    """The mean difference over tasks, each with the same weight.

    Attributes:
        tasks: those that are tested: shares of right items, above chance.
        difference: second - first, with a bootstrap interval over the items of each task.
        p_value: by turned signs of items (or clusters).
        equivalence, smallest: as of a task.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    tasks: list[str]
    difference: Estimate
    p_value: float
    equivalence: float
    smallest: float | None
    verdict: Verdict


def mcnemar(losses: int, gains: int) -> float:
    """The exact two-sided p of McNemar's test: a fair coin for every item that differs."""
    return float(stats.binomtest(gains, losses + gains).pvalue) if losses + gains else 1.0


def sign_flip(tasks: Sequence[Blocks], seed: int = 0, flips: int = RESAMPLES) -> float:
    """Two-sided p of the mean difference over tasks, the sign of every block turned by chance.

    Blocks of the same size of difference are counted, not listed, so that right and wrong answers
    of any number cost nothing; `scipy.stats.permutation_test` gives the same in much longer.
    """
    parts = [block.sums / (block.sizes.sum() * len(tasks)) for block in tasks]
    values = np.concatenate(parts)
    observed = abs(float(values.sum()))
    sizes, counts = np.unique(np.abs(values[values != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    rng, reached = np.random.default_rng(seed), 0
    for start in range(0, flips, _BATCH):
        drawn = min(_BATCH, flips - start), len(counts)
        if counts.max() == 1:  # the same draw, faster
            up = rng.integers(0, 2, drawn, np.int8)
        else:
            up = rng.binomial(counts, 0.5, drawn)
        turned = 2 * (up @ sizes) - counts @ sizes
        reached += int((np.abs(turned) >= observed * (1 - 1e-9)).sum())
    return (reached + 1) / (flips + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given."""
    values = np.asarray(p_values, np.float64)
    order = np.argsort(values)
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


def equivalence(tasks: Sequence[Blocks], margin: float) -> float:
    """The p of two one-sided tests (TOST) that the mean difference over tasks is within a margin.

    The error is Bonett and Price's (2012): one item more that is lost and one that is gained, so
    that a few items without any difference prove nothing. Clusters count as in a sandwich estimate.

    Args:
        tasks: their differences between -1 and 1.
        margin: a share, such as .02 for two points.
    """
    means, variances = zip(*map(_adjusted, tasks), strict=True)
    mean = float(np.mean(means))
    error = math.sqrt(sum(variances)) / len(tasks)
    freedom = max(sum(len(block.sums) for block in tasks) - len(tasks), 1)
    low, high = (mean + margin) / error, (mean - margin) / error
    return float(max(stats.t.sf(low, freedom), stats.t.cdf(high, freedom)))


def _adjusted(block: Blocks) -> tuple[float, float]:
    """Mean difference of an item and the variance of that mean."""
    sums, sizes = np.append(block.sums, (1.0, -1.0)), np.append(block.sizes, (1.0, 1.0))
    mean = float(sums.sum() / sizes.sum())
    few = 1.0 if (block.sizes == 1).all() else len(sums) / (len(sums) - 1)
    return mean, few * float(((sums - mean * sizes) ** 2).sum()) / float(sizes.sum()) ** 2


def detectable(tasks: Sequence[Blocks]) -> float | None:
    """The smallest mean difference over tasks seen with a power of 80 %, given what differs.

    (z + z) sqrt(d / m) for a share d of m items that differ; of clusters and other numbers what
    stands in the place of d / m: the squared error were there no difference.
    """
    squares = sum(float((block.sums**2).sum() / block.sizes.sum() ** 2) for block in tasks)
    reach = float(stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf(POWER))
    return reach * math.sqrt(squares) / len(tasks) or None


def smallest_difference(items: int, discordance: float) -> float:
    """The difference of accuracies that so many items show, before anything is run.

    Args:
        discordance: the share of items that one of two models answers rightly, and one wrongly.

    Returns:
        A share, with LEVEL and POWER; where it is above `discordance`, no difference is shown.
    """
    # Power: reach = z_a sqrt(d) + z_b sqrt(d - reach^2 / n), with reach = difference sqrt(n).
    alpha, beta = stats.norm.ppf(1 - LEVEL / 2), stats.norm.ppf(POWER)
    shrunk = items + beta**2
    root = alpha**2 * items - shrunk * (alpha**2 - beta**2)
    if root < 0:  # so few that even all that differs, in one direction, is not enough
        return math.inf
    return float(math.sqrt(discordance) * (alpha * math.sqrt(items) + math.sqrt(root)) / shrunk)


def items_needed(difference: float, discordance: float) -> int | None:
    """How many items show a difference; None where more differs than there is discordance."""
    if difference > discordance:
        return None
    alpha, beta = stats.norm.ppf(1 - LEVEL / 2), stats.norm.ppf(POWER)
    reach = alpha * math.sqrt(discordance) + beta * math.sqrt(discordance - difference**2)
    return math.ceil((reach / difference) ** 2)


def verdict(gain: float, p_value: float, equal: float | None) -> Verdict:
    """What two tests say together.

    Args:
        gain: the difference in favour of the second.
        p_value: of no difference.
        equal: of one beyond the margin.
    """
    if p_value < LEVEL and gain:
        return "better" if gain > 0 else "worse"
    return "equivalent" if equal is not None and equal < LEVEL else "undecided"


def pooled_interval(tasks: Sequence[Blocks], seed: int) -> Estimate:
    """The mean difference over tasks; the blocks of each are drawn again by themselves."""
    value = float(np.mean([block.mean for block in tasks]))
    if any(len(block.sums) == 1 for block in tasks):
        return Estimate(value, -math.inf, math.inf)
    rngs = np.random.default_rng(seed).spawn(len(tasks))
    drawn = np.mean([redrawn(*pair) for pair in zip(tasks, rngs, strict=True)], axis=0)
    low, high = np.quantile(drawn, (LEVEL / 2, 1 - LEVEL / 2))
    return Estimate(value, float(low), float(high))
