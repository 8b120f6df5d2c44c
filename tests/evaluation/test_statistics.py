"""Intervals against textbook values and simulation."""

import numpy as np
import pytest

from idp_jax.evaluation.statistics import accuracy_interval, paired_difference, perplexity_ratio


def test_wilson_interval_of_a_textbook_case():
    """Brown, Cai and DasGupta's interval by its formula, for 45 of 50."""
    z, n, p = 1.959964, 50, 0.9
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    found = accuracy_interval([1] * 45 + [0] * 5)
    assert (found.value, found.low, found.high) == pytest.approx(
        (p, centre - half, centre + half), abs=1e-6
    )


@pytest.mark.parametrize("right", [0, 4])
def test_extreme_accuracies_keep_a_width(right):
    found = accuracy_interval([1] * right + [0] * (4 - right))
    assert 0 <= found.low < found.high <= 1


def test_paired_difference_of_a_clear_and_of_no_effect():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, 400)
    better = np.where(rng.random(400) < 0.2, 1, first)
    found = paired_difference(first, better)
    assert found.value == pytest.approx(better.mean() - first.mean())
    assert found.low < found.value < found.high and found.excludes(0)
    normal = 1.96 * (better - first).std() / 20
    assert (found.high - found.low) / 2 == pytest.approx(normal, rel=0.1)
    assert not paired_difference(first, rng.permutation(first)).excludes(0)
    assert paired_difference(first, better, seed=3) == paired_difference(first, better, seed=3)


def test_same_answers_differ_by_nothing():
    found = paired_difference([1, 0, 1], [1, 0, 1])
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_perplexity_ratio_is_of_perplexities():
    rng = np.random.default_rng(0)
    first = rng.normal(3, 0.5, 50)
    second = first + rng.normal(0.1, 0.05, 50)
    found = perplexity_ratio(first, second)
    assert found.value == pytest.approx(np.exp(second.mean()) / np.exp(first.mean()))
    assert found.low < found.value < found.high and found.excludes(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accuracy_interval([]), "one number per item"),
        (lambda: accuracy_interval([0.5]), "got 0.5"),
        (lambda: paired_difference([1, 0], [1]), "got 2 and 1"),
        (lambda: perplexity_ratio([[1.0]], [[1.0]]), "one number per item"),
    ],
)
def test_bad_scores_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
