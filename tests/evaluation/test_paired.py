"""Paired tests: known answers, scipy's own, and simulations in which nothing differs."""

import math

import numpy as np
import pytest
from scipy import stats

from idp_jax.evaluation.paired import (
    detectable,
    equivalence,
    holm,
    items_needed,
    mcnemar,
    pooled_interval,
    sign_flip,
    smallest_difference,
    verdict,
)
from idp_jax.evaluation.statistics import paired_blocks, paired_difference


def blocks(losses, gains, items, clusters=None):
    """The differences of so many items, the lost ones first."""
    second = [-1.0] * losses + [1.0] * gains + [0.0] * (items - losses - gains)
    return paired_blocks([0.0] * items, second, clusters)


@pytest.mark.parametrize(
    ("losses", "gains", "p_value"),
    [(8, 22, 0.01612), (5, 18, 0.01062), (40, 60, 0.05689), (22, 8, 0.01612), (0, 0, 1), (1, 0, 1)],
)
def test_mcnemar_is_exact(losses, gains, p_value):
    assert mcnemar(losses, gains) == pytest.approx(p_value, abs=5e-6)


def test_turned_signs_of_single_items_are_mcnemar():
    for losses, gains in ((8, 22), (5, 18), (40, 60)):
        found = sign_flip([blocks(losses, gains, 300)], flips=100_000)
        assert found == pytest.approx(mcnemar(losses, gains), abs=0.003)
    assert sign_flip([blocks(0, 0, 5)]) == 1 and sign_flip([blocks(0, 1, 1)]) > 0.9


def test_turned_signs_of_numbers_are_scipys():
    values = np.random.default_rng(0).normal(0.3, 1, 40)
    found = sign_flip([paired_blocks([0.0] * 40, values)], flips=50_000)
    mean = lambda x, axis: np.mean(x, axis)
    theirs = stats.permutation_test(
        (values,), mean, permutation_type="samples", n_resamples=50_000, rng=1
    )
    assert found == pytest.approx(theirs.pvalue, abs=0.005)


def test_tasks_have_the_same_weight_in_the_pool():
    """A large task without a difference does not hide what many small ones have in common."""
    small, large = [blocks(2, 12, 50) for _ in range(3)], blocks(500, 500, 10_000)
    assert sign_flip([*small, large]) < 0.001
    found = pooled_interval([*small, large], seed=0)
    assert found.value == pytest.approx(3 * 0.2 / 4) and found.excludes(0)
    alone = paired_difference([0.0] * 50, [-1.0] * 2 + [1.0] * 12 + [0.0] * 36)
    together = pooled_interval([blocks(2, 12, 50)], seed=0)
    assert together.low == pytest.approx(alone.low, abs=0.02)
    assert pooled_interval([blocks(0, 1, 1)], seed=0).low == -math.inf


def test_clusters_count_as_one_item():
    """Ten copies of every item are no more evidence than one of each."""
    losses, gains, items = 8, 22, 100
    owners = [str(i) for i in range(items) for _ in range(10)]
    second = np.repeat([-1.0] * losses + [1.0] * gains + [0.0] * (items - losses - gains), 10)
    copied = paired_blocks([0.0] * len(second), second, owners)
    assert sign_flip([copied], flips=50_000) == pytest.approx(mcnemar(losses, gains), abs=0.003)
    clustered = paired_difference([0.0] * len(second), second, clusters=owners)
    single = paired_difference([0.0] * items, second[::10])
    assert (clustered.low, clustered.high) == (single.low, single.high)
    assert detectable([copied]) == pytest.approx(detectable([blocks(losses, gains, items)]))
    apart = paired_difference([0.0] * len(second), second)
    assert apart.high - apart.low < 0.5 * (clustered.high - clustered.low)


def test_holm_is_holms():
    # Worked by hand: 4 x .005, 3 x .01, then never less than before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1, 1] and holm([]) == []


def test_equivalence_by_its_formula():
    """Bonett and Price's interval, worked by hand for 1 and 7 of 21 that differ."""
    lost, gained = 2 / 23, 8 / 23
    error = math.sqrt((lost + gained - (gained - lost) ** 2) / 23)
    by_hand = stats.t.cdf((gained - lost - 0.5) / error, 20)
    # The two items that are added are no part of the mean's numerator: 6 of 23.
    assert equivalence([blocks(1, 7, 21)], 0.5) == pytest.approx(by_hand)


def test_few_items_without_a_difference_prove_nothing():
    assert equivalence([blocks(0, 0, 50)], 0.02) > 0.05
    assert equivalence([blocks(0, 0, 450)], 0.02) < 0.05
    assert equivalence([blocks(200, 200, 1_000)], 0.02) > 0.05
    assert equivalence([blocks(200, 200, 10_000)], 0.02) < 0.05


# The tables of power, in points: a share of .05, .10, .15, .20 and .30 of the items differs.
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3)
SMALLEST = {
    450: (2.95, 4.17, 5.10, 5.89, 7.21),
    2_376: (1.28, 1.82, 2.22, 2.57, 3.15),
    7_731: (0.71, 1.01, 1.23, 1.42, 1.74),
}
NEEDED = {0.02: (979, 1_960, 2_941, 3_923, 5_885), 0.03: (434, 870, 1_306, 1_742, 2_614)}


def test_power_before_a_run():
    for items, row in SMALLEST.items():
        found = [100 * smallest_difference(items, share) for share in SHARES]
        assert found == pytest.approx(row, abs=0.005)
    for difference, row in NEEDED.items():
        assert tuple(items_needed(difference, share) for share in SHARES) == row
    assert items_needed(0.2, 0.1) is None and smallest_difference(2, 0.1) > 0.1


def test_the_smallest_difference_is_seen_four_times_of_five():
    items, share, rng = 2_000, 0.1, np.random.default_rng(0)
    change = smallest_difference(items, share)
    chances = [(share - change) / 2, (share + change) / 2, 1 - share]
    drawn = rng.multinomial(items, chances, size=2_000)
    seen = np.mean([mcnemar(losses, gains) < 0.05 for losses, gains, _ in drawn])
    assert seen == pytest.approx(0.8, abs=0.04)
    observed = detectable([blocks(100, 100, items)])
    assert observed == pytest.approx(change, rel=0.02) and detectable([blocks(0, 0, 9)]) is None


def rejections(p_values) -> float:
    """Percent below .05."""
    return 100 * float(np.mean(np.asarray(p_values) < 0.05))


def test_a_thousand_nulls_reject_one_in_twenty():
    rng = np.random.default_rng(0)
    flips = lambda: rng.binomial(1_000, 0.5)
    # The exact test keeps below its level by what is discrete in it; 1,000 items differ.
    pairs = [(found, 1_000 - found) for found in (flips() for _ in range(1_000))]
    assert rejections([mcnemar(*pair) for pair in pairs]) == pytest.approx(5, abs=1.5)
    found = []
    for number in range(1_000):
        sizes = rng.integers(50, 500, 5)
        tasks = [blocks(lost := rng.binomial(n // 5, 0.5), n // 5 - lost, n) for n in sizes]
        found.append(sign_flip(tasks, seed=number, flips=499))
    assert rejections(found) == pytest.approx(5, abs=1.5)


def test_a_thousand_nulls_of_clusters_reject_one_in_twenty():
    """Where items of a cluster move together, tests of single items reject far too often."""
    rng, clustered, single = np.random.default_rng(1), [], []
    owners = np.repeat(np.arange(60), 20).astype(str)
    for number in range(1_000):
        shift = np.repeat(rng.normal(0, 0.5, 60), 20)
        second = np.sign(rng.normal(shift, 1)) * (rng.random(1_200) < 0.3)
        found = paired_blocks(np.zeros(1_200), second, owners)
        clustered.append(sign_flip([found], seed=number, flips=499))
        single.append(mcnemar(int((second < 0).sum()), int((second > 0).sum())))
    assert rejections(clustered) == pytest.approx(5, abs=1.5) and rejections(single) > 10


def test_a_thousand_differences_at_the_margin_are_rarely_equivalent():
    rng = np.random.default_rng(2)
    drawn = rng.multinomial(2_000, [0.04, 0.06, 0.9], size=1_000)
    found = [equivalence([blocks(*row[:2], 2_000)], 0.02) for row in drawn]
    assert rejections(found) == pytest.approx(5, abs=1.5)


def test_no_difference_is_said_by_equivalence_alone():
    assert verdict(0.1, 0.01, None) == "better" and verdict(-0.1, 0.01, 0.01) == "worse"
    assert verdict(0.1, 0.2, 0.01) == "equivalent"
    assert verdict(0.1, 0.2, None) == verdict(0.0, 1.0, 0.06) == "undecided"
