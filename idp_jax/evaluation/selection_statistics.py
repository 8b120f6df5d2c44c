"""Does choosing a prompt for every input help? Statistics of utilities and choices, numpy alone.

U [N, M] holds how well item n fares under each of M fixed prompts (larger is better), choices [N]
what a policy takes. The invariant: a policy is judged by its value on every item, U[n, choice], so
that any two are paired, and nothing here knows a model.

Two nulls, which are not the same. That of a policy shuffles its choices across items: it keeps how
often each prompt is taken, and so what a better prompt is worth to all, and breaks what was chosen
for which item. That of the oracle must be another: the largest of M numbers is above their mean
even if the numbers are noise, and no shuffle within an item changes it. See `oracle_null`.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

from idp_jax.evaluation.statistics import RESAMPLES, Estimate

SHUFFLES = 2000
_AT_ONCE = 500  # resamples
_SAME = 1e-12  # below it two means that were summed in another order are one


@dataclass(frozen=True)
class Usage:
    """How a policy spreads over the prompts.

    Attributes:
        counts: how often each prompt was chosen.
        effective: exp of the entropy of their shares: 1 is always the same, M evenly all.
        largest: the share of the prompt that is chosen most.
    """

    counts: list[int]
    effective: float
    largest: float


@dataclass(frozen=True)
class Tested:
    """A gain and the chance of one as large where nothing is to be found.

    Attributes:
        gain: with its interval.
        p_value: of a permutation test.
    """

    gain: Estimate
    p_value: float


@dataclass(frozen=True)
class OracleNull:
    """What the oracle gains over a random prompt, and what it would gain of noise.

    Attributes:
        gain: mean of (largest - mean) of an item's utilities.
        null: its mean where the prompts' strengths are dealt to the items anew.
        beyond: gain - null, with the jackknife's interval over items.
        p_value: of a gain as far above the null (one-sided).
    """

    gain: float
    null: float
    beyond: Estimate
    p_value: float


@dataclass(frozen=True)
class Correlation:
    """Spearman's correlation of scores and utilities within an item, ties sharing their ranks.

    Attributes:
        mean: over the items that have one; None where none has.
        items: the number of these.
        tied_utilities: share of items whose prompts all fare alike, so that no choice matters.
        tied_scores: share of items for which the selector's scores are all the same.
    """

    mean: Estimate | None
    items: int
    tied_utilities: float
    tied_scores: float


def utility_matrix(utilities: np.ndarray) -> np.ndarray:
    """Utilities as float64 [N, M].

    Raises:
        ValueError: not [N, M] with an item and two prompts or more, or one is no finite number.
    """
    found = np.asarray(utilities, np.float64)
    if found.ndim != 2 or found.shape[0] < 1 or found.shape[1] < 2:
        raise ValueError(
            f"utilities must be [items, prompts] of 2 prompts or more, got {found.shape}"
        )
    if not np.isfinite(found).all():
        item, prompt = np.argwhere(~np.isfinite(found))[0]
        raise ValueError(f"the utility of item {item} under prompt {prompt} is no finite number")
    return found


def chosen_values(utilities: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """U[n, choices[n]] for every item, float64 [N].

    Raises:
        ValueError: another number of choices, or one that names no prompt.
    """
    utilities, choices = utility_matrix(utilities), np.asarray(choices)
    count, prompts = utilities.shape
    if choices.shape != (count,):
        raise ValueError(f"{count} items need as many choices, got shape {choices.shape}")
    if choices.min() < 0 or choices.max() >= prompts:
        raise ValueError(f"choices must lie between 0 and {prompts - 1}")
    return utilities[np.arange(count), choices]


def usage(choices: np.ndarray, prompts: int) -> Usage:
    """How often each of `prompts` prompts was chosen."""
    counts = np.bincount(choices, minlength=prompts)
    shares = counts / counts.sum()
    return Usage(counts.tolist(), float(np.exp(stats.entropy(shares))), float(shares.max()))


def best_fixed(utilities: np.ndarray, seed: int = 0) -> np.ndarray:
    """For every item the one prompt that is best on the other half of the items, int [N].

    The halves are drawn once and change places (cross-fitting), so that every item is held out and
    the policy is paired with all others. Of a single item it is prompt 0.
    """
    utilities = utility_matrix(utilities)
    half = np.random.default_rng(seed).permutation(len(utilities)) % 2
    choices = np.zeros(len(utilities), np.int64)
    for side in (0, 1):
        if (half != side).any():
            choices[half == side] = utilities[half != side].mean(0).argmax()
    return choices


def random_draws(utilities: np.ndarray, draws: int = 10, seed: int = 0) -> list[float]:
    """Mean utility of prompts drawn at random, once for each of `draws` seeds from `seed` on."""
    utilities = utility_matrix(utilities)
    count, prompts = utilities.shape
    drawn = (np.random.default_rng(seed + n).integers(prompts, size=count) for n in range(draws))
    return [float(chosen_values(utilities, choices).mean()) for choices in drawn]


def recovery(utilities: np.ndarray, values: np.ndarray, seed: int = 0) -> Estimate | None:
    """(mean value - random) / (oracle - random), with a bootstrap interval over items.

    Args:
        values: [N] of the policy.

    Returns:
        None where the oracle gains nothing: all prompts fare alike.
    """
    utilities = utility_matrix(utilities)
    random, oracle = utilities.mean(1), utilities.max(1)
    parts = np.stack([values - random, oracle - random], 1)
    gained, possible = parts.mean(0)
    if possible <= _SAME:
        return None
    drawn = _resampled_means(parts, seed)
    drawn = drawn[drawn[:, 1] > _SAME]
    return _estimate(gained / possible, drawn[:, 0] / drawn[:, 1], len(parts))


def matching(utilities: np.ndarray, choices: np.ndarray, seed: int = 0) -> Tested:
    """What a policy gains because it takes the right prompt for the right item.

    mean U[n, c_n] - sum_m p_m mean_n U[n, m]: the mean value less that of the same choices dealt to
    the items at random. Taking a prompt that is better for all gains nothing here. The p-value is
    of the two-sided permutation test, exact for items that may be exchanged.
    """
    utilities = utility_matrix(utilities)
    values = chosen_values(utilities, choices)
    count, prompts = utilities.shape
    taken = (np.asarray(choices)[:, None] == np.arange(prompts)).astype(np.float64)
    columns = np.concatenate([values[:, None], taken, utilities], 1)
    gain = lambda means: (
        means[..., 0] - (means[..., 1 : prompts + 1] * means[..., prompts + 1 :]).sum(-1)
    )
    found = float(gain(columns.mean(0)))
    rng = np.random.default_rng(seed)
    # Only deviations from an item's mean can change under a shuffle.
    centred = utilities - utilities.mean(1, keepdims=True)
    expected = float((taken.mean(0) * centred.mean(0)).sum())
    rows = np.arange(count)
    dealt = np.asarray([centred[rows, rng.permutation(choices)].mean() for _ in range(SHUFFLES)])
    as_large = np.abs(dealt - expected) >= abs(found) - _SAME
    p_value = (1 + int(as_large.sum())) / (1 + SHUFFLES)
    return Tested(_estimate(found, gain(_resampled_means(columns, seed)), count), p_value)


def oracle_null(utilities: np.ndarray, threshold: float | None = None) -> OracleNull:
    """The oracle's gain over a random prompt against that of noise of the same size.

    The null: U[n, m] = item n's ease + prompt m's worth + a deviation of prompt m that has nothing
    to do with the other prompts' on that item. Ease and worth are estimated by means; what is left
    is dealt to the items anew, each prompt's by itself, which keeps every prompt's distribution.
    Shuffling raw utilities would deal out the items' ease as well, which is far larger. Row means
    take 1/M of the deviations' variance with them, so these are scaled by sqrt(M / (M - 1)) first,
    and the estimated ease is shrunk by as much. The mean over all ways to deal is computed, not
    drawn, and the interval is the jackknife's over items: the shuffles' own spread is not that of
    new items, for what the row means took is the same in all of them.

    It is right for normal deviations of one size. Where some items' are larger than others', the
    null is too large: it misses something but claims nothing. It can only see prompts that are good
    where others are bad; that a strength can be known from the input is shown by choices made on
    one part of an item and scored on another, or by `matching`.

    Args:
        threshold: what counts is whether a utility lies above it; default is the utility itself.
    """
    utilities = utility_matrix(utilities)
    gain, null = _oracle_gains(utilities, threshold)
    rows, count = np.arange(len(utilities)), len(utilities)
    if count < 3:  # as much is needed for a spread
        return OracleNull(gain, null, Estimate(gain - null, -math.inf, math.inf), 1.0)
    without = [_oracle_gains(utilities[rows != row], threshold) for row in rows]
    differences = np.asarray([found - dealt for found, dealt in without])
    error = math.sqrt((count - 1) * float(differences.var()))
    if error <= _SAME:
        return OracleNull(gain, null, Estimate(gain - null, gain - null, gain - null), 1.0)
    reach = float(stats.t.ppf(0.975, count - 1)) * error
    p_value = float(stats.t.sf((gain - null) / error, count - 1))
    beyond = Estimate(gain - null, gain - null - reach, gain - null + reach)
    return OracleNull(gain, null, beyond, p_value)


def _oracle_gains(utilities: np.ndarray, threshold: float | None) -> tuple[float, float]:
    """The oracle's gain as it is, and its mean over all ways to deal out the deviations."""
    count, prompts = utilities.shape
    grand, worth = utilities.mean(), utilities.mean(0)
    ease = utilities.mean(1, keepdims=True) - grand
    left = utilities - ease - worth
    variance = np.square(left).sum() / max((count - 1) * (prompts - 1), 1)
    spread = np.square(ease).sum() / max(count - 1, 1)
    if spread > 0:
        ease = ease * math.sqrt(max(0.0, 1 - variance / prompts / spread))
    dealt = worth + left * math.sqrt(prompts / (prompts - 1))
    ordered = [np.sort(column) for column in dealt.T]
    # The share of the ways in which prompt m's deviation leaves it at a value or below.
    below = lambda values: np.stack(
        [np.searchsorted(column, values, "right") / count for column in ordered]
    )
    if threshold is None:
        values = np.unique(dealt)
        steps = np.diff(below(values).prod(0), prepend=0)
        return float((utilities.max(1) - utilities.mean(1)).mean()), float(
            values @ steps - dealt.mean()
        )
    right = utilities > threshold
    shares = below(threshold - ease[:, 0])
    null = (1 - shares.prod(0)).mean() - (1 - shares).mean()
    return float((right.any(1) - right.mean(1)).mean()), float(null)


def within_item(utilities: np.ndarray, scores: np.ndarray, seed: int = 0) -> Correlation:
    """Spearman's correlation of an item's scores [N, M] with its utilities, over the items."""
    utilities = utility_matrix(utilities)
    ranks = [stats.rankdata(x, axis=1) for x in (utilities, np.asarray(scores))]
    centred = [rank - rank.mean(1, keepdims=True) for rank in ranks]
    norms = [np.sqrt(np.square(x).sum(1)) for x in centred]
    known = (norms[0] > 0) & (norms[1] > 0)
    rho = (centred[0] * centred[1]).sum(1)[known] / (norms[0] * norms[1])[known]
    tied = [float((norm == 0).mean()) for norm in norms]
    return Correlation(mean_estimate(rho, seed) if len(rho) else None, len(rho), *tied)


def agreement(first: np.ndarray, second: np.ndarray) -> tuple[float, float | None]:
    """Share of items of which two policies choose the same prompt, and Cohen's kappa.

    Kappa is None where chance alone makes them agree: both always take the same prompt.
    """
    first, second = np.asarray(first), np.asarray(second)
    names = np.union1d(first, second)
    same = float((first == second).mean())
    chance = float(sum((first == name).mean() * (second == name).mean() for name in names))
    return same, None if chance >= 1 - _SAME else (same - chance) / (1 - chance)


def mean_estimate(values: np.ndarray, seed: int = 0) -> Estimate:
    """The mean with a percentile bootstrap interval over items."""
    values = np.asarray(values, np.float64)
    drawn = _resampled_means(values[:, None], seed)[:, 0]
    return _estimate(float(values.mean()), drawn, len(values))


def log_mean(logprobs: np.ndarray, axis: int) -> np.ndarray:
    """The log of the mean of probabilities that are given by their logs: a uniform ensemble."""
    count = np.asarray(logprobs).shape[axis]
    return np.logaddexp.reduce(np.asarray(logprobs, np.float64), axis) - math.log(count)


def _resampled_means(columns: np.ndarray, seed: int) -> np.ndarray:
    """Means of the columns [N, C] over items drawn again: [RESAMPLES, C]."""
    count = len(columns)
    drawn = _draws(count, seed, RESAMPLES)
    pieces = range(0, len(drawn), _AT_ONCE)
    return np.concatenate([drawn[n : n + _AT_ONCE] @ columns / count for n in pieces])


@lru_cache(maxsize=2)
def _draws(count: int, seed: int, resamples: int) -> np.ndarray:
    """How often each item is in each resample, [resamples, count]; the same for all policies."""
    rng, even = np.random.default_rng(seed), np.full(count, 1 / count)
    return rng.multinomial(count, even, size=resamples).astype(np.uint16)


def _estimate(value: float, drawn: np.ndarray, count: int) -> Estimate:
    if count == 1:  # one item says nothing of how much others would differ
        return Estimate(float(value), -math.inf, math.inf)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))
