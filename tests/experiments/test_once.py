"""Measurements are kept, and taken again where they are the same as they were written."""

import json

import pytest

from idp_jax.evaluation.results import VariantResult
from idp_jax.experiments.once import measure_once
from tests.evaluation.test_results import task, text, variant

ASKED = {"tasks": "t", "inputs": {"model": {"a": "1"}}}


@pytest.fixture
def kept(tmp_path):
    """Where they are kept, a way to ask for them, and how often they were measured."""
    calls = []

    def ask(asked=ASKED) -> list[VariantResult]:
        def measure():
            calls.append(1)
            lost = text((1600.0, 2.0))
            return [variant("pool", tasks={"t": task()}, perplexity=lost)]

        return measure_once(tmp_path / "r.json", asked, measure)

    return tmp_path / "r.json", ask, calls


def test_what_was_measured_is_not_measured_again(kept):
    _, ask, calls = kept
    assert ask() == ask() == ask() and len(calls) == 1
    ask({**ASKED, "tasks": "u"})
    assert len(calls) == 2


@pytest.mark.parametrize("change", ["number", "junk", "digest"])
def test_what_was_changed_is_measured_again(kept, change):
    file, ask, calls = kept
    found = ask()
    tree = json.loads(file.read_text())
    if change == "number":
        tree["variants"][0]["perplexity"]["tokens"] += 1
    if change == "digest":
        del tree["config"]["digest"]
    file.write_text("junk" if change == "junk" else json.dumps(tree))
    assert ask() == found and len(calls) == 2
