"""A sweep's rows: shares and intervals against a second computation, and the page they make."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from idp_jax.analysis.sweep_figure import draw_sweep
from idp_jax.commands import sweep as command
from idp_jax.config import ConfigError, Sweep
from idp_jax.config.files import from_dict, to_dict
from idp_jax.evaluation.statistics import Estimate, mean_interval, paired_ratio
from idp_jax.evaluation.sweep_results import (
    Baseline,
    Control,
    RecipeResult,
    SweepResults,
    Trial,
    read_sweep,
    write_sweep,
)
from idp_jax.experiments.sweep_rows import Measured, Scores, control_of, measured_recipe
from idp_jax.experiments.sweep_table import columns_of, markdown, rows_of
from tests.evaluation.test_results import task, text, variant

DENSE, BARE = (2.0, 2.2, 2.4, 2.6), (3.0, 3.4, 3.2, 3.6)
SEEDS = ((2.5, 2.9, 2.9, 3.0), (2.4, 2.9, 2.7, 3.0))
ROW = RecipeResult(
    compression="c", recipe="r", trials=[Trial(0.1, 2.0, 3)], chosen=0.1, edge=True, seeds=[1, 2]
)


def measured(losses, right, second=None) -> Measured:
    """One model on two tasks of a group, and on a second text."""
    tasks = {"knowledge_a": task(right[:2]), "knowledge_b": task(right[2:]), "bear": task([1.0])}
    first = variant(perplexity=text(losses), tasks=tasks)
    other = None if second is None else variant(perplexity=text(second, digest="second"))
    return Measured(first, other)


def scores(*measurements) -> Scores:
    return Scores.of(measurements, ["knowledge", "bear"])


def test_shares_are_of_lost_log_perplexity_over_seeds_and_over_windows():
    dense = scores(measured(DENSE, [1.0, 1, 1, 1], DENSE))
    bare = scores(measured(BARE, [0.0, 1, 0, 0], BARE))
    finals = [measured(losses, [1.0, 1, 0, 0], BARE) for losses in SEEDS]
    row = measured_recipe(ROW, finals, dense, bare, bare, ["knowledge", "bear"], 0)
    lost = np.mean(BARE) - np.mean(DENSE)
    shares = [(np.mean(BARE) - np.mean(losses)) / lost for losses in SEEDS]
    np.testing.assert_allclose(row.shares, shares)
    low, high = stats.t.interval(0.95, 1, np.mean(shares), np.std(shares, ddof=1) / math.sqrt(2))
    np.testing.assert_allclose((row.share.low, row.share.high), (low, high))
    assert row.share_windows.value == pytest.approx(np.mean(shares))
    assert row.share_windows.low < row.share_windows.value < row.share_windows.high
    assert row.against == row.share_windows  # against the compressed model itself
    assert row.perplexity == pytest.approx(math.exp(np.mean(SEEDS)))
    assert row.second_ratio.value == 1.0 and row.second_perplexity == math.exp(np.mean(BARE))
    assert list(row.accuracy) == ["knowledge", "bear"]
    assert row.accuracy["knowledge"].value == 0.5 and row.accuracy_change["bear"].value == 0
    assert row.accuracy_change["knowledge"].value == pytest.approx(0.25)


def test_the_ratio_of_means_is_drawn_in_pairs():
    """A numerator in proportion has no doubt in its share, however much the windows differ."""
    rng = np.random.default_rng(0)
    lost = rng.uniform(0.1, 2.0, 30)
    exact = paired_ratio((0.25 * lost).tolist(), lost.tolist())
    np.testing.assert_allclose((exact.value, exact.low, exact.high), 0.25)
    gained = rng.uniform(0.0, 1.0, 30)
    found = paired_ratio(gained.tolist(), lost.tolist(), seed=1)
    drawn = np.random.default_rng(5).integers(0, 30, (20_000, 30))
    low, high = np.quantile(gained[drawn].mean(1) / lost[drawn].mean(1), [0.025, 0.975])
    np.testing.assert_allclose((found.low, found.high), (low, high), rtol=0.03)
    assert paired_ratio([1.0, 1.0], [0.0, -1.0]) is None  # nothing was lost
    assert mean_interval([0.5]).low == -math.inf


def test_other_windows_and_items_are_not_paired():
    first = measured(DENSE, [1.0, 1, 1, 1])
    other = Measured(dataclasses.replace(first.first, perplexity=text(DENSE, digest="x")), None)
    with pytest.raises(ConfigError, match="cannot be paired"):
        scores(first, other)


def test_a_control_is_held_against_the_uncompressed_model():
    dense = measured(DENSE, [1.0, 1, 0, 0], DENSE)
    lower = measured([x - 0.1 for x in DENSE], [1.0, 1, 1, 0], DENSE)
    found = control_of(lower, scores(dense), ["knowledge", "bear"], 0)
    assert found.perplexity.value == pytest.approx(math.exp(-0.1))
    assert found.second_perplexity.value == 1 and found.accuracy["knowledge"].value == 0.25


def fabricated() -> SweepResults:
    """A sweep of two recipes, one of which diverged once, beside one that never trained."""
    data = {"train": "a.jsonl", "held_out": "b.jsonl"}
    recipes = {"prompt": {}, "lora": {"method": "lora"}, "wild": {}}
    settings = {"model": "m", "out": "o", "data": data, "recipes": recipes, "dense_controls": True}
    between = lambda value: Estimate(value, value - 0.1, value + 0.1)
    known = {"compression": "compressed", "seeds": [1, 2, 3], "tokens": 131072, "seconds": 411.6}
    numbers = {"perplexity": 20.5, "second_perplexity": 31.25, "second_ratio": between(0.95)}
    accuracy = {"accuracy": {"knowledge": between(0.5)}}
    accuracy |= {"accuracy_change": {"knowledge": between(-0.05)}}
    control = Control(between(0.99), None, {})
    trials = [Trial(0.003, 3.21, 9), Trial(0.01, 3.1, 9), Trial(0.03, math.inf)]
    prompt = RecipeResult(
        recipe="prompt", trials=trials, chosen=0.01, edge=False, parameters=28800, control=control,
        shares=[0.5, 0.55, 0.6], share=between(0.55), share_windows=between(0.55),
        **known, **numbers, **accuracy,
    )  # fmt: skip
    lora = dataclasses.replace(
        prompt, recipe="lora", chosen=0.003, edge=True, seeds=[1, 2], diverged=[3],
        shares=[0.61, 0.63], share=between(0.62), share_windows=between(0.62),
        against=between(0.07), control=None,
    )  # fmt: skip
    wild = RecipeResult(
        compression="compressed", recipe="wild", chosen=None, edge=False,
        trials=[Trial(rate, math.inf) for rate in (1.0, 2.0, 3.0)],
    )  # fmt: skip
    bare = [Baseline("dense", 12.0, 20.0, {"knowledge": between(0.77)})]
    bare.append(Baseline("compressed", 30.0, 33.0, {"knowledge": between(0.55)}))
    return SweepResults(
        config=to_dict(from_dict(Sweep, settings)),
        environment={"device": "cpu", "cpu_cores": 2},
        reference="prompt",
        baselines=bare,
        recipes=[prompt, lora, wild],
    )


GOLDEN = """\
| recipe | learning rate | share, seeds | share, windows | against prompt | perplexity | second text | second, times | knowledge % | change | parameters | tokens | seconds | beside dense, times |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| dense |  |  |  |  | 12.00 | 20.00 |  | 77.0 [67.0, 87.0] |  |  |  |  |  |
| compressed |  |  |  |  | 30.00 | 33.00 |  | 55.0 [45.0, 65.0] |  |  |  |  |  |
| prompt | 0.01 | 0.550 [0.450, 0.650] | 0.550 [0.450, 0.650] |  | 20.50 | 31.25 | 0.950 [0.850, 1.050] | 50.0 [40.0, 60.0] | -5.0 [-15.0, +5.0] | 28,800 | 131,072 | 412 | 0.990 [0.890, 1.090] |
| lora | 0.003*, seed 3 diverged | 0.620 [0.520, 0.720] | 0.620 [0.520, 0.720] | +0.070 [-0.030, +0.170] | 20.50 | 31.25 | 0.950 [0.850, 1.050] | 50.0 [40.0, 60.0] | -5.0 [-15.0, +5.0] | 28,800 | 131,072 | 412 | diverged |
| wild | all diverged |  |  |  |  |  |  |  |  |  |  |  |  |
"""  # noqa: E501


def test_the_page_of_a_sweep():
    page = markdown(fabricated())
    assert f"### compressed\n\n{GOLDEN}" in page and page.startswith("m: each recipe had 3 ")
    assert "- compressed, prompt: 0.003: 3.2100; 0.01: 3.1000; 0.03: diverged\n" in page


def test_a_file_of_a_sweep_is_read_as_it_was_written(tmp_path):
    found = fabricated()
    write_sweep(found, tmp_path / "sweep.json")
    assert "Infinity" not in (tmp_path / "sweep.json").read_text()
    assert read_sweep(tmp_path / "sweep.json") == found
    bad = dataclasses.replace(found.recipes[0], seconds=math.nan)
    with pytest.raises(ConfigError, match=r"recipes\.0\.seconds is nan"):
        write_sweep(dataclasses.replace(found, recipes=[bad]), tmp_path / "other.json")
    (tmp_path / "sweep.json").write_text('{"schema": "other"}')
    with pytest.raises(ConfigError, match="is not idp-jax.sweep/1"):
        read_sweep(tmp_path / "sweep.json")


def test_the_command_prints_what_was_found(monkeypatch, capsys):
    found = fabricated()
    monkeypatch.setattr("idp_jax.experiments.run_sweep", lambda *args, **options: found)
    command.run(from_dict(Sweep, found.config))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120 and "…" not in out
    cells = {word.strip() for line in out.splitlines() for word in line.split("│")}
    assert {"lora", "28,800", "diverged", "0.01"} <= cells and "o/ (sweep.json" in out
    shown = columns_of(found)
    assert [row[0] for row in rows_of(found, "compressed", shown)] == [
        "dense", "compressed", "prompt", "lora", "wild",
    ]  # fmt: skip


def test_a_figure_is_drawn_where_all_diverged_too(tmp_path):
    found = fabricated()
    draw_sweep(found, tmp_path / "a.png")
    draw_sweep(dataclasses.replace(found, recipes=found.recipes[2:]), tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 1000
