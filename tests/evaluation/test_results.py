"""Result files: what is written can be read again, and what is no result is refused in a line."""

import dataclasses
import json
import math

import pytest

from idp_jax.config import ConfigError
from idp_jax.evaluation.results import (
    SCHEMA,
    Comparison,
    LatencyResult,
    PerplexityResult,
    Results,
    TaskResult,
    VariantResult,
    read,
    write,
)
from idp_jax.evaluation.statistics import Estimate, exponential

LABELS = {"relation": ["P1", "P1", "P2"], "domains": ["a; b", "a", ""]}


def task(scores=(1.0, 0.0, 1.0), **changes) -> TaskResult:
    """A task of as many items as there are scores."""
    return dataclasses.replace(
        TaskResult(
            metrics={"acc": sum(scores) / len(scores)},
            interval={"acc": (0.2, 0.9)},
            items=len(scores),
            num_fewshot=0,
            version=1.0,
            samples={"acc": list(scores)},
            documents=[f"hash {i}" for i in range(len(scores))],
            choices=[1, 2],
            prompts=[[0], [1], [1]],
            refused={7: "too long"},
            labels=LABELS if len(scores) == 3 else {},
        ),
        **changes,
    )


def text(losses=(3.0, 3.5, 4.0), digest="d") -> PerplexityResult:
    """A perplexity of as many windows as there are losses."""
    mean = sum(losses) / len(losses)
    return PerplexityResult(exponential(mean), mean, 93, len(losses), list(losses), digest, "a.txt")


def variant(name="a", **changes) -> VariantResult:
    """A variant with everything that a file may hold."""
    times = LatencyResult(1.0, 2.0, 500.0, [1.0], [2.0], 1, 8, 0, 4, 1, "cpu", "float32", "none")
    known = {"role": "repaired", "model": "m", "adapter": "p", "selector": "random"}
    measured = {"tasks": {"t": task()}, "groups": {"g": {"acc": 0.5}}, "mean_accuracy": 2 / 3}
    rest = {"extra_parameters": 7, "prompt_lengths": [3, 5], "perplexity": text()}
    return VariantResult(name=name, **{**known, **measured, **rest, "latency": times, **changes})


def results(*variants, **changes) -> Results:
    """A file's contents."""
    return Results(
        config={"model": "m"}, environment={"jax": "0"}, variants=list(variants), **changes
    )


def test_a_file_gives_the_same_results_again(tmp_path):
    estimate = Estimate(0.1, 0.0, 0.2)
    pair = Comparison("a", "b", {"t": estimate}, estimate, None)
    plain = VariantResult(name="b", role="dense", model="m")
    whole = results(variant(), plain, comparisons=[pair])
    write(whole, tmp_path / "r.json")
    assert read(tmp_path / "r.json") == whole
    tree = json.loads((tmp_path / "r.json").read_text())
    assert next(iter(tree)) == "schema" and tree["schema"] == SCHEMA == "idp-jax.results/1"
    first = tree["variants"][0]
    assert first["tasks"]["t"]["samples"] == {"acc": [1.0, 0.0, 1.0]}
    assert first["tasks"]["t"]["choices"] == [1, 2]
    assert first["perplexity"]["per_window_nll"] == [3.0, 3.5, 4.0]
    assert tree["variants"][1]["perplexity"] is tree["variants"][1]["latency"] is None
    assert whole.variant("b") is plain
    with pytest.raises(ConfigError, match="no variant 'c' in these results; there are a, b"):
        whole.variant("c")


def test_files_of_before_there_were_labels_are_read(tmp_path):
    tree = dataclasses.asdict(results(variant()))
    for name in ("chance", "labels", "questions"):
        del tree["variants"][0]["tasks"]["t"][name]
    (tmp_path / "r.json").write_text(json.dumps(tree))
    found = read(tmp_path / "r.json").variants[0].tasks["t"]
    assert found.labels == {} and found.samples == task().samples


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"mean_accuracy": math.nan}, r"variants\.0\.mean_accuracy is nan"),
        ({"perplexity": text([3.0, math.inf])}, r"variants\.0\.perplexity\.mean_nll is inf"),
        ({"tasks": {"t": task([0.0, math.nan])}}, r"variants\.0\.tasks\.t\.metrics\.acc is nan"),
    ],
)
def test_no_number_is_no_result(tmp_path, changes, place):
    with pytest.raises(ConfigError, match=place):
        write(results(variant(**changes)), tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


def test_what_no_float_holds_is_null_and_infinite_again(tmp_path):
    """A mean loss of 900 has no perplexity; the difference on one item has no bounds."""
    alone = Estimate(1.0, -math.inf, math.inf)
    large = dataclasses.replace(text(), perplexity=math.inf, interval=(1e5, math.inf))
    metrics = {"t": task(metrics={"acc": 0.5, "word_perplexity": math.inf})}
    whole = results(
        variant(perplexity=large, tasks=metrics),
        comparisons=[Comparison("a", "b", {"t": alone}, alone, alone)],
    )
    write(whole, tmp_path / "r.json")
    assert read(tmp_path / "r.json") == whole
    tree = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert tree["variants"][0]["perplexity"]["perplexity"] is None


def changed(change) -> str:
    """The text of a file after `change` of its tree."""
    tree = dataclasses.asdict(results(variant()))
    change(tree)
    return json.dumps(tree)


BAD = {
    "no-json": ("{", "r.json is not JSON: "),
    "nan": ('{"schema": NaN}', "r.json is not JSON: NaN is no number"),
    "older": ('{"tasks": {}}', r"names no schema: .*; evaluate again \(idp-jax eval\)"),
    "list": ("[]", "names no schema"),
    "newer": ('{"schema": "idp-jax.results/9"}', "'idp-jax.results/9' is not idp-jax.results/1"),
    "missing": (changed(lambda t: t.pop("variants")), "r.json: variants: .*required"),
    "unknown": (
        changed(lambda t: t["variants"][0]["tasks"]["t"].update(sample=1)),
        r"unknown key 'variants\.0\.tasks\.t\.sample'",
    ),
    "type": (
        changed(lambda t: t["variants"][0]["perplexity"].update(windows="many")),
        r"r\.json: variants\.0\.perplexity\.windows: .*integer.*'many'",
    ),
    "role": (
        changed(lambda t: t["variants"][0].update(role="best")),
        r"--variants\.0\.role 'best' is not one of dense, compressed",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_what_is_no_result_is_refused(tmp_path, content, message):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path / "r.json")
    assert "\n" not in str(error.value) and "r.json" in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"r\.json cannot be read: No such file"):
        read(tmp_path / "r.json")


def test_prompts_of_one_length_have_numbers():
    named = lambda *lengths: dataclasses.replace(variant(), prompt_lengths=[*lengths]).prompt_names
    assert named(3, 5) == ["3 tokens", "5 tokens"] and named() == []
    assert named(5, 5) == ["prompt 0, 5 tokens", "prompt 1, 5 tokens"]


def test_choices_are_counted_over_tasks():
    assert variant(tasks={"t": task(), "u": task(choices=[0, 3])}).choices == [1, 5]
    assert variant(tasks={"t": task(choices=None)}).choices is None
