"""A grid's rows and contrasts on hand-made results whose numbers can be checked by hand."""

import dataclasses
import math

import pytest

from idp_jax.config import ConfigError
from idp_jax.evaluation import paired
from idp_jax.evaluation.grid_results import aggregate
from idp_jax.evaluation.statistics import paired_blocks
from tests.config.test_reproduce import grid
from tests.evaluation.test_results import results, task, text, variant

# By name: the scores of two tasks for seeds 1 and 2, and the loss of both windows of each seed.
DENSE = {"dense": ([[1, 1, 1, 1], [1, 0]], [[1, 1, 1, 1], [1, 0]], 2.0, 2.0)}
DENSE |= {"dense + prompt": ([[1, 1, 1, 1], [1, 1]], [[1, 1, 1, 1], [0, 0]], 2.0, 2.0)}
THREE = {
    "three": ([[1, 0, 0, 0], [0, 0]], [[1, 0, 0, 0], [0, 0]], 4.0, 4.0),
    "three + prompt": ([[1, 1, 0, 0], [0, 0]], [[1, 0, 0, 0], [1, 0]], 3.0, 3.5),
    "three + idp": ([[1, 1, 1, 0], [0, 0]], [[1, 1, 1, 0], [1, 0]], 3.0, 3.0),
    "three + idp, random": ([[1, 0, 0, 0], [0, 0]], [[1, 1, 1, 0], [1, 0]], 3.5, 3.5),
}


def made(rows, seed):
    """The results of a cell."""
    found = []
    for name, (*scores, first, second) in rows.items():
        of_a, of_b = scores[seed - 1]
        loss = (first, second)[seed - 1]
        role = {"dense": "dense", "three": "compressed"}.get(name, "repaired")
        own = {
            "t": task([float(x) for x in of_a]),
            "g_b": task([float(of_b[0])]),
            "g_c": task([float(of_b[1])]),
        }
        common = {"role": role, "extra_parameters": 7}
        found.append(variant(name, tasks=own, perplexity=text([loss, loss + 1]), **common))
        other = {"tasks": {}, "perplexity": text([loss + 1], "second")}
        found.append(variant(f"{name}, second text", **common, **other))
    return results(*found)


def settings(**changes):
    own = {"models": ["m"], "compressions": {"three": {}}, "seeds": [1, 2], "dense": ["prompt"]}
    return grid(**{**own, "controls": ["random"], "tasks": "t,g", **changes})


def cells(seeds=(1, 2)):
    return {
        ("m", name, seed): made(rows, seed)
        for name, rows in ((None, DENSE), ("three", THREE))
        for seed in seeds
    }


def test_rows_are_means_over_seeds_and_tasks_count_alike():
    found = aggregate(settings(), cells())
    rows = {row.name: row for row in found.rows}
    assert list(rows) == [*DENSE, *THREE] and not found.missing
    assert rows["dense"].tasks["t"].value == 1 and rows["dense"].tasks["g"].value == 0.5
    assert rows["dense"].mean.value == 0.75  # whatever the number of items
    prompt = rows["three + prompt"]
    assert prompt.tasks["t"].value == (2 + 1) / 8 and prompt.tasks["g"].value == 1 / 4
    assert prompt.mean.value == pytest.approx((3 / 8 + 1 / 4) / 2)
    assert prompt.seeds == [1, 2] and prompt.parameters == 7
    assert prompt.perplexity == pytest.approx(math.exp(3.75))
    assert prompt.second_perplexity == pytest.approx(math.exp(4.25))
    # Of the 2 nats that were lost: 1 came back with the first seed, 0.5 with the second.
    assert prompt.share.value == pytest.approx(0.75 / 2)
    assert rows["three"].share is None and rows["dense + prompt"].share is None
    assert prompt.choices == [2 * 3 * 1, 2 * 3 * 2]


def test_changes_are_paired_by_item_and_by_seed():
    rows = {row.name: row for row in aggregate(settings(), cells()).rows}
    lost = rows["three"].change
    assert (lost.first, lost.second, lost.seeds) == ("dense", "three", [1, 2])
    assert lost.tasks["t"].value == -0.75 and lost.test.difference.value == (-0.75 - 0.5) / 2
    assert (
        lost.over_seeds.value == lost.over_seeds.low == lost.test.difference.value
    )  # both seeds lost it
    assert lost.ratio.value == pytest.approx(math.exp(2))
    gained = rows["three + prompt"].change
    assert gained.first == "three"
    # By seed: (1/4 + 0)/2 and (0 + 1/2)/2; Student's t of one degree of freedom is 12.706.
    assert gained.test.difference.value == pytest.approx((0.125 + 0.25) / 2)
    reach = 12.7062 * 0.0625
    assert gained.over_seeds.low == pytest.approx(0.1875 - reach, abs=1e-4)
    assert gained.test.difference.low < 0.1875 < gained.test.difference.high
    assert gained.ratio.value == pytest.approx(math.exp(-0.75))
    assert gained.second_ratio.value == pytest.approx(math.exp(-0.75))
    assert rows["dense + prompt"].change.test.difference.value == pytest.approx(0)


def test_a_pool_is_held_against_its_controls():
    (pair,) = aggregate(settings(), cells()).contrasts["m", "three"]
    assert (pair.first, pair.second) == ("three + idp, random", "three + idp")
    assert pair.test.difference.value == pytest.approx((0.5 + 0) / 4)
    assert pair.ratio.value == pytest.approx(math.exp(-0.5))


def test_what_is_missing_is_named_and_pairs_keep_to_the_seeds_that_are_there():
    found = cells()
    del found["m", None, 2]
    grid_of = aggregate(settings(), found)
    rows = {row.name: row for row in grid_of.rows}
    assert grid_of.missing == ["m, dense, seed 2"]
    assert rows["three"].seeds == [1, 2] and rows["three"].change.seeds == [1]
    assert rows["three"].change.over_seeds.low == -math.inf  # of one seed nothing is known
    assert aggregate(settings(), {}).rows == []
    alone = aggregate(settings(), {("m", "three", 1): found["m", "three", 1]})
    assert alone.rows[0].change is None and alone.rows[1].change.first == "three"


def test_cells_of_other_items_or_windows_are_refused():
    found = cells()
    other = made(THREE, 2)
    other.variants[0].tasks["t"].documents[0] = "another"
    with pytest.raises(ConfigError, match="'three' was scored on different items or windows"):
        aggregate(settings(), found | {("m", "three", 2): other})
    both = [found["m", "three", 1], found["m", "three", 2]]
    for each in both:
        for row in each.variants:
            for one in row.tasks.values():
                one.documents[0] = "another"
    with pytest.raises(ConfigError, match="different items or windows in two cells"):
        aggregate(settings(), found)


def test_tasks_at_chance_are_no_part_of_means_and_of_tests():
    found = cells()
    for each in found.values():
        for row in each.variants:
            for name, one in row.tasks.items():
                row.tasks[name] = dataclasses.replace(one, chance=0.25 if name == "t" else 0.5)
    grid_of = aggregate(settings(), found)
    assert grid_of.at_chance == {"m": ["g"]}  # of two items one is right: no more than guessing
    rows = {row.name: row for row in grid_of.rows}
    assert rows["dense"].mean.value == 1 and rows["dense"].tasks["g"].value == 0.5
    assert rows["three"].change.test.tasks == ["t"]
    assert rows["three"].change.test.difference.value == -0.75


def test_tests_that_are_looked_at_together_are_adjusted():
    """Forty items: each repair gains ten of them for sure; of three, Holm takes p three times."""
    many, none = [1.0] * 10 + [0.0] * 30, [0.0] * 40
    rows = {"three": none, "three + prompt": many, "three + idp": many, "three + other": none}
    found = [
        variant(name, role="repaired" if "+" in name else "compressed", tasks={"t": task(scores)})
        for name, scores in rows.items()
    ]
    own = {"recipes": {"prompt": {}, "idp": {}, "other": {}}, "controls": []}
    grid_of = aggregate(settings(**own), {("m", "three", 1): results(*found)})
    tests = {row.name: row.change.test for row in grid_of.rows if row.change is not None}
    gained = tests["three + prompt"]
    assert gained.verdict == "better" and tests["three + other"].verdict == "undecided"
    alone = paired.sign_flip([paired_blocks(none, many)])
    assert gained.p_value == pytest.approx(3 * alone) and tests["three + other"].p_value == 1
