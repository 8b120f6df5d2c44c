"""Log-odds and bits of the right answer, from log-probabilities that are known."""

import math
from types import SimpleNamespace

import pytest

from idp_jax.evaluation.measures import measures


def task(options, answer, **changes):
    """What `measures` asks of a task of the harness."""
    known = {"OUTPUT_TYPE": "multiple_choice", "multiple_input": 0}
    known["doc_to_choice"] = lambda item: options
    known["doc_to_target"] = lambda item: answer
    return SimpleNamespace(**{**known, **changes})


@pytest.mark.parametrize("answer", [1, "éa", [1], [0, 1]])
def test_the_right_answer_against_the_mean_of_the_others(answer):
    found = measures(task(["abc", "éa", "b"], answer), {}, [-4.0, -1.0, -2.0])
    others = -2.0 if answer == [0, 1] else -3.0
    assert found["gold_log_odds"] == pytest.approx(-1.0 - others)
    assert found["gold_bits_per_byte"] == pytest.approx(1.0 / math.log(2) / 3)


def test_options_in_the_question_and_options_alone():
    """WinoGrande scores one text behind several; a mutual information scores the options twice."""
    inside = task(["Al came", "Bea came"], " home", multiple_input=2, doc_to_text=lambda item: 0)
    found = measures(inside, {}, [-3.0, -1.0])
    assert found["gold_log_odds"] == -2.0
    assert found["gold_bits_per_byte"] == pytest.approx(3.0 / math.log(2) / 5)
    twice = measures(task(["a", "b"], 0), {}, [-1.0, -2.0, -90.0, -90.0])
    assert twice["gold_log_odds"] == 1.0


def test_what_has_no_measure():
    assert measures(task(["a"], 0, OUTPUT_TYPE="loglikelihood"), {}, [-1.0]) == {}
    assert measures(task(["a", "b"], 7), {}, [-1.0, -2.0]) == {}
    assert set(measures(task(["a", "b"], [0, 1]), {}, [-1.0, -2.0])) == {"gold_bits_per_byte"}
