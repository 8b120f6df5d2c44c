"""Statistics of choosing: known answers, and nulls that cry wolf as often as they say."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from idp_jax.evaluation import selection_statistics as selection


def planted(items: int, prompts: int, seed: int, noise: float = 1.0) -> np.ndarray:
    """Items of very different ease, prompts of different worth, and noise."""
    rng = np.random.default_rng(seed)
    ease, worth = rng.normal(0, 5, (items, 1)), rng.normal(0, 0.3, prompts)
    return ease + worth + noise * rng.normal(size=(items, prompts))


def test_usage_counts_and_its_effective_number():
    found = selection.usage(np.array([0, 0, 1, 1]), 3)
    assert found.counts == [2, 2, 0] and found.largest == 0.5
    assert found.effective == pytest.approx(2)
    assert selection.usage(np.array([2, 2]), 3).effective == pytest.approx(1)
    assert selection.usage(np.arange(4), 4).effective == pytest.approx(4)


def test_values_are_those_of_the_chosen_prompts():
    utilities = np.array([[1.0, 2], [3, 4], [5, 6]])
    assert selection.chosen_values(utilities, np.array([1, 0, 1])).tolist() == [2, 3, 6]
    with pytest.raises(ValueError, match="3 items need as many choices"):
        selection.chosen_values(utilities, np.array([1]))
    with pytest.raises(ValueError, match="between 0 and 1"):
        selection.chosen_values(utilities, np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="item 1 under prompt 0 is no finite"):
        selection.utility_matrix([[0, 1], [math.nan, 1]])
    with pytest.raises(ValueError, match="2 prompts or more"):
        selection.utility_matrix([[0], [1]])


def test_random_is_the_mean_over_prompts():
    """Its exact expectation: over all ways to choose, each of the same chance."""
    utilities = planted(3, 3, 0)
    every = [selection.chosen_values(utilities, np.array(c)).mean() for c in every_choice(3, 3)]
    assert np.mean(every) == pytest.approx(utilities.mean())
    drawn = selection.random_draws(planted(2000, 4, 1), 10)
    assert len(set(drawn)) == 10
    assert np.mean(drawn) == pytest.approx(planted(2000, 4, 1).mean(), abs=0.05)


def every_choice(items: int, prompts: int):
    """All assignments of prompts to items."""
    return itertools.product(range(prompts), repeat=items)


def test_recovery_has_0_at_random_and_1_at_the_oracle():
    utilities = planted(200, 4, 2)
    oracle, random = utilities.max(1), utilities.mean(1)
    assert selection.recovery(utilities, oracle).value == pytest.approx(1)
    assert selection.recovery(utilities, random).value == 0
    half = selection.recovery(utilities, (oracle + random) / 2)
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    assert selection.recovery(np.ones((5, 3)), np.ones(5)) is None
    some = selection.recovery(utilities, np.where(np.arange(200) < 100, oracle, random))
    assert some.low < some.value < some.high and 0.3 < some.value < 0.7
    one = selection.recovery(utilities[:1], oracle[:1])
    assert one.value == pytest.approx(1) and one.low == -math.inf


def test_best_fixed_is_scored_where_it_was_not_chosen():
    utilities = np.random.default_rng(3).normal(size=(1000, 4))
    choices = selection.best_fixed(utilities)
    assert len(set(choices.tolist())) <= 2
    # Prompt 1 is best by far, so both halves take it.
    utilities[:, 1] += 3
    assert set(selection.best_fixed(utilities)) == {1}
    assert selection.best_fixed(utilities[:1]).tolist() == [0]
    # Of noise alone it gains nothing on average; the best in hindsight does.
    gains, hindsight = [], []
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(size=(40, 4))
        held_out = selection.chosen_values(noise, selection.best_fixed(noise, seed))
        gains.append(held_out.mean() - noise.mean())
        hindsight.append(noise.mean(0).max() - noise.mean())
    # Choosing on one half and drawing on the other ties the two a little, hence the bound.
    assert abs(np.mean(gains)) < 0.05 < np.mean(hindsight)


def test_matching_counts_only_the_right_prompt_for_the_right_item():
    rng = np.random.default_rng(4)
    utilities = planted(300, 3, 5)
    utilities[:, 2] += 2
    always = selection.matching(utilities, np.full(300, 2))
    assert always.gain.value == pytest.approx(0) and always.p_value == 1
    oracle = selection.matching(utilities, utilities.argmax(1))
    assert oracle.gain.low > 0 and oracle.p_value < 0.01
    choices = rng.integers(3, size=300)
    shares = np.bincount(choices, minlength=3) / 300
    expected = selection.chosen_values(utilities, choices).mean() - shares @ utilities.mean(0)
    assert selection.matching(utilities, choices).gain.value == pytest.approx(expected)


def test_the_matching_test_is_calibrated(monkeypatch):
    """Choices that know the better prompt but not the item; ease, worth and spread differ."""
    monkeypatch.setattr(selection, "SHUFFLES", 199)
    monkeypatch.setattr(selection, "RESAMPLES", 500)
    found = []
    for seed in range(400):
        rng = np.random.default_rng(1000 + seed)
        utilities = planted(60, 4, seed) * rng.choice([0.5, 3], (60, 1))
        choices = rng.choice(4, 60, p=[0.6, 0.2, 0.1, 0.1])
        found.append(selection.matching(utilities, choices, seed).p_value)
    assert_calibrated(found)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [2, 4, 8])
def test_the_oracles_null_is_calibrated_where_there_is_noise_alone(prompts):
    found = [selection.oracle_null(planted(80, prompts, n)) for n in range(300)]
    assert_calibrated([result.p_value for result in found])
    beyond = np.array([result.beyond.value for result in found])
    error = beyond.std(ddof=1) / math.sqrt(len(beyond))
    assert abs(beyond.mean()) < 3 * error + 0.002  # of deviations of size 1
    assert all(result.gain > 0.3 for result in found)  # what an oracle seems to gain of noise
    outside = sum(result.beyond.excludes(0) for result in found)
    assert stats.binomtest(outside, 300, 0.05).pvalue > 0.001


def assert_calibrated(p_values: list[float]) -> None:
    """About one in twenty is below 0.05, and they are spread evenly."""
    count = len(p_values)
    below = sum(p <= 0.05 for p in p_values)
    assert stats.binomtest(below, count, 0.05).pvalue > 0.001, below / count
    assert stats.kstest(p_values, "uniform").pvalue > 0.001


def test_the_null_is_the_mean_over_all_ways_to_deal():
    """The worth and the scaled deviations, shuffled again and again, against the exact mean."""
    utilities = planted(12, 3, 0)
    centred = utilities - utilities.mean(1, keepdims=True)
    worth = centred.mean(0)
    left = (centred - worth) * math.sqrt(3 / 2)
    rng = np.random.default_rng(1)
    drawn = [(worth + rng.permuted(left, axis=0)).max(1).mean() for _ in range(20_000)]
    assert selection.oracle_null(utilities).null == pytest.approx(np.mean(drawn), abs=0.005)


def test_the_oracles_null_keeps_silent_of_items_of_different_spread():
    spread = np.random.default_rng(0).choice([0.2, 3], (100, 1))
    below = [selection.oracle_null(planted(100, 4, n) * spread).p_value <= 0.05 for n in range(50)]
    assert np.mean(below) <= 0.05


def test_the_oracles_null_finds_prompts_that_are_good_where_others_are_bad():
    rng = np.random.default_rng(6)
    utilities = rng.normal(0, 5, (300, 1)) + 0.3 * rng.normal(size=(300, 4))
    utilities[np.arange(300), rng.integers(4, size=300)] += 2
    found = selection.oracle_null(utilities)
    assert found.beyond.low > 0 and found.p_value < 0.01
    assert found.beyond.value == pytest.approx(found.gain - found.null)
    flat = selection.oracle_null(np.ones((20, 3)))
    assert (flat.gain, flat.null, flat.p_value) == (0, 0, 1)
    few = selection.oracle_null(utilities[:2])
    assert few.beyond.low == -math.inf and few.p_value == 1


def test_the_null_of_right_and_wrong_is_that_of_the_margins():
    """Answers that are right where a margin is above 0: noise alone gives what noise gives."""
    found = [selection.oracle_null(planted(120, 4, n), threshold=0) for n in range(200)]
    beyond = np.array([result.beyond.value for result in found])
    assert np.mean([result.gain for result in found]) > 0.05
    assert abs(beyond.mean()) < 0.004
    below = sum(result.p_value <= 0.05 for result in found)
    assert stats.binomtest(below, 200, 0.05).pvalue > 0.001


def test_correlations_within_items_are_scipys_and_count_ties():
    rng = np.random.default_rng(7)
    utilities = rng.integers(0, 3, (50, 4)).astype(float)
    scores = rng.integers(0, 3, (50, 4)).astype(float)
    utilities[0], scores[1] = 1, 2
    varied = lambda row: len(set(row)) > 1
    pairs = zip(utilities, scores, strict=True)
    expected = [stats.spearmanr(u, s)[0] for u, s in pairs if varied(u) and varied(s)]
    found = selection.within_item(utilities, scores)
    assert found.items == len(expected) < 50
    assert found.mean.value == pytest.approx(np.mean(expected))
    assert found.tied_utilities == np.mean([not varied(u) for u in utilities])
    assert found.tied_scores == np.mean([not varied(s) for s in scores])
    assert selection.within_item(np.ones((3, 2)), np.ones((3, 2))).mean is None
    assert selection.within_item(utilities, utilities).mean.value == pytest.approx(1)


def test_a_planted_selector_is_found_between_random_and_the_oracle():
    rng = np.random.default_rng(8)
    utilities = planted(400, 4, 9)
    centred = utilities - utilities.mean(1, keepdims=True)
    scores = centred + rng.normal(size=centred.shape)
    choices = scores.argmax(1)
    values = selection.chosen_values(utilities, choices)
    share = selection.recovery(utilities, values)
    assert 0.4 < share.low < share.high < 0.95
    assert selection.matching(utilities, choices).gain.low > 0
    assert 0.3 < selection.within_item(utilities, scores).mean.value < 0.9


def test_agreement_is_cohens():
    first, second = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 2])
    same, kappa = selection.agreement(first, second)
    chance = (2 * 1 + 2 * 3 + 1 * 1) / 25
    assert same == 0.8 and kappa == pytest.approx((0.8 - chance) / (1 - chance))
    assert selection.agreement(np.zeros(3), np.zeros(3)) == (1, None)
    assert selection.agreement(np.zeros(3), np.ones(3)) == (0, 0)


def test_an_ensemble_averages_probabilities():
    probabilities = np.random.default_rng(10).uniform(0.1, 1, (5, 3))
    found = selection.log_mean(np.log(probabilities), 1)
    np.testing.assert_allclose(np.exp(found), probabilities.mean(1))
    assert selection.log_mean(np.array([-2000.0, -2000.0]), 0) == pytest.approx(-2000)
