"""A grid's settings: its cells, their rows, and one line for what cannot be used."""

import re
from pathlib import Path

import pytest

from idp_jax.config import ConfigError, Reproduce
from idp_jax.config.files import from_dict

POOL = {"method": "idp", "pool_lengths": [2, 3], "objective": "kl", "selector": "mean_logit"}
RECIPES = {"prompt": {"method": "prompt"}, "idp": POOL}


def tree(**changes) -> dict:
    data = {"train": "hub:c4", "held_out": "held.jsonl"}
    common = {"models": ["org/a", "b.gguf"], "out": "o", "data": data, "recipes": RECIPES}
    return common | {"compressions": {"three": {"bits": 3}, "half": {}}, "tokens": 2048} | changes


def grid(**changes) -> Reproduce:
    return from_dict(Reproduce, tree(**changes))


def test_a_cell_is_a_model_a_compression_or_none_and_a_seed():
    found = grid(seeds=[1, 5], dense=["prompt"])
    cells = found.all_cells()
    assert [cell.name for cell in cells[:4]] == [
        "org/a, dense, seed 1", "org/a, three, seed 1", "org/a, half, seed 1",
        "org/a, dense, seed 5",
    ]  # fmt: skip
    assert len(cells) == 12 and len({cell.settings.out for cell in cells}) == 12
    assert cells[1].settings.out == Path("o/org_a/three/seed-1")
    assert cells[-1].settings.out == Path("o/b.gguf/half/seed-5")
    dense, three = cells[0].settings, cells[1].settings
    assert dense.compressions == {} and [row.name for row in dense.rows] == [
        "dense", "dense + prompt",
    ]  # fmt: skip
    assert [(row.name.removeprefix("three"), row.role, row.selector) for row in three.rows] == [
        ("", "compressed", None),
        (" + prompt", "repaired", None),
        (" + idp", "repaired", None),
        (" + idp, random", "control", "random"),
        (" + idp, best-fixed", "control", "best-fixed"),
        (" + idp, oracle", "control", "oracle"),
        (" + idp, summed", "control", None),
    ]
    assert three.seed == 1 and not three.latency and three.train_tokens == 2048


@pytest.mark.parametrize(("of", "method"), [("prompts", "prompt"), ("prefixes", "prefix")])
def test_one_prompt_of_the_summed_length_has_the_pools_tokens_and_its_recipe(of, method):
    cell = grid(recipes={"idp": {**POOL, "pool": {"of": of}}}).all_cells()[1]
    assert cell.settings.adapters["idp-summed"] == {
        "method": method, "prompt_length": 5, "tokens": 4096, "objective": "kl",
    }  # fmt: skip
    without = grid(controls=["random"]).all_cells()[1].settings
    assert list(without.adapters) == ["prompt", "idp"] and len(without.rows) == 4


def test_a_pool_may_be_a_presets():
    cell = grid(recipes={"paper": {"preset": "paper"}})
    assert cell.pools == ("paper",)


def test_parts_are_all_cells_once():
    whole = [cell.name for cell in grid().all_cells()]
    parts = [[c.name for c in grid(cells=f"{i}/5").chosen_cells()] for i in range(1, 6)]
    assert sorted(name for part in parts for name in part) == sorted(whole)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


BAD = {
    "cells": ({"cells": "0/3"}, "--cells 0/3 is no part such as 1/8 to 8/8"),
    "cells-more": ({"cells": "4/3"}, "--cells 4/3"),
    "cells-text": ({"cells": "first"}, "--cells first"),
    "dense": ({"dense": ["lora"]}, "--dense lora is not one of prompt, idp"),
    "control": ({"controls": ["best"]}, "--controls best is not one of random, best-fixed, or"),
    "seeds": ({"seeds": [1, 1]}, r"--seeds \(1, 1\) must be different numbers"),
    "name": ({"compressions": {"a/b": {}}}, "compressions: 'a/b' cannot name a folder"),
    "dense-name": ({"compressions": {"dense": {}}}, "'dense' is the uncompressed model"),
    "budget": ({"recipes": {"a": {"tokens": 5}}}, "recipes.a: tokens is the same for all"),
    "models": ({"models": ["org/a", "org_a"]}, "two have the folder org_a"),
    "none": ({"recipes": {}}, "a grid needs models, compressions, recipes and seeds"),
    "recipe": ({"recipes": {"a": {"rank": 5}}}, "recipes.a: unknown key 'rank'"),
    "tokens": ({"tokens": 5}, "--tokens 5 must be at least 1024"),
    "place": ({"data": {"train": "o/x.txt", "held_out": "h.jsonl"}, "out": "o"}, None),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_one_line(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "x.txt").write_text("")
    with pytest.raises(ConfigError, match=message or re.escape("--out o holds the data.train")):
        grid(**changes)
