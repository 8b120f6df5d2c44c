"""The bound of a perfect choice: per item, per window, and from the prompts alone."""

import math

import pytest

from idp_jax.evaluation.pool_bounds import oracle
from tests.evaluation.test_results import task, text, variant


def test_the_oracle_takes_each_items_and_each_windows_best_prompt():
    scores = ([1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0])
    prompts = [
        variant(tasks={"t": task(own), "u": task(own[::-1])}, perplexity=text(losses))
        for own, losses in zip(scores, ([3.0, 5.0], [4.0, 4.0]), strict=True)
    ]
    found = oracle(prompts)
    assert found.tasks["t"].samples["acc"] == [1.0, 0.0, 1.0, 1.0]
    assert found.tasks["t"].choices == [2, 2] and found.tasks["t"].metrics == {"acc": 0.75}
    assert found.mean_accuracy == 0.75
    low, high = found.tasks["t"].interval["acc"]
    assert 0 < low < 0.75 < high < 1
    assert found.perplexity.per_window_nll == [3.0, 4.0]
    assert found.perplexity.perplexity == pytest.approx(math.exp(3.5))
    assert found.perplexity.digest == prompts[0].perplexity.digest


def test_other_metrics_follow_the_prompt_that_was_chosen():
    first = task([0.0], samples={"acc": [0.0], "acc_norm": [1.0]})
    second = task([1.0], samples={"acc": [1.0], "acc_norm": [0.0]})
    found = oracle([variant(tasks={"t": each}, perplexity=None) for each in (first, second)])
    assert found.tasks["t"].samples == {"acc": [1.0], "acc_norm": [0.0]}
    assert found.perplexity is None


def test_of_one_prompt_it_is_that_prompt():
    only = variant()
    found = oracle([only])
    assert found.perplexity.per_window_nll == only.perplexity.per_window_nll
    assert found.tasks["t"].samples == only.tasks["t"].samples
