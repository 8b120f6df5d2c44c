"""Experiments: the variants say what is made, and nothing is made twice."""

import json

import jax
import pytest

from idp_jax.cli import main
from idp_jax.config import ConfigError, Demo, Experiment, Variant
from idp_jax.config.files import from_dict
from idp_jax.evaluation import read
from idp_jax.experiments import run, stages
from tests.helpers import tiny_folder

ADAPTERS = {
    "idp": {"method": "idp", "pool_lengths": [2, 4]},
    "lora": {"method": "lora", "lora": {"rank": 2}, "selector": "first"},
}
VARIANTS = [
    Variant("dense", "dense"),
    Variant("small", "compressed", "four"),
    Variant("long, random", "repaired", "four", "idp"),
    Variant("short", "repaired", "four", "idp/prompt_0_2_tokens"),
    Variant("pool on dense", "control", None, "idp", "random"),
]


@pytest.fixture(scope="module", autouse=True)
def optax_promotes():
    """optax raises floats to int32 powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def tree(folder, **changes) -> dict:
    """An experiment of seconds, as a file would say it."""
    common = {"model": str(folder / "model"), "out": str(folder / "out"), "items": 1}
    sizes = {"sequence_length": 16, "calibration_windows": 2, "validation_windows": 4}
    training = {"train_tokens": 64, "batch_size": 2, "evaluate_every": 1}
    timing = {"prompt_length": 4, "new_tokens": 1, "repeats": 1}
    recipes = {"compression": {"group_size": 32}, "compressions": {"four": {"bits": 4}}}
    recipes |= {"adapters": ADAPTERS, "variants": VARIANTS, "tasks": "knowledge_arts"}
    return {**common, **sizes, **training, **recipes, "timing": timing, **changes}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished experiment: its settings, results and the stages it went through."""
    folder = tmp_path_factory.mktemp("experiment")
    tiny_folder(folder / "model", num_layers=1, max_positions=512)
    settings, said = from_dict(Experiment, tree(folder)), []
    return settings, run(settings, begin=said.append), said


def test_the_table_has_the_variants_with_their_roles(finished):
    settings, results, _ = finished
    assert [(row.name, row.role) for row in results.variants] == [
        (row.name, row.role) for row in VARIANTS
    ]
    assert read(settings.out / "results.json") == results
    dense, small, pool, short, control = results.variants
    assert dense.model == str(settings.model) and dense.extra_parameters == 0
    assert small.model == str(settings.out / "models" / "four")
    assert pool.prompt_lengths == [2, 4] and pool.extra_parameters == 6 * 64
    assert short.prompt_lengths == [2] and short.extra_parameters == 2 * 64
    assert control.selector == "random" and "dense" in control.adapter
    assert all(row.latency and row.perplexity.windows == 2 for row in results.variants)
    report = json.loads((settings.out / "models" / "four" / "compression.json").read_text())
    assert report["config"]["bits"] == 4 and report["config"]["group_size"] == 32
    assert (settings.out / "figure.png").stat().st_size > 1000


def test_every_variant_is_compared_with_its_model(finished):
    _, results, _ = finished
    assert [(pair.first, pair.second) for pair in results.comparisons] == [
        ("dense", "small"),
        ("small", "long, random"),
        ("small", "short"),
        ("dense", "pool on dense"),
    ]
    assert all(pair.perplexity_ratio and pair.overall for pair in results.comparisons)


def test_a_stage_whose_result_is_there_is_not_run_again(finished, monkeypatch):
    settings, results, said = finished
    assert said[:2] == ["text", "compression: four"]
    again = lambda *args, **options: pytest.fail("a finished stage ran again")
    for name in ("sample_documents", "compress", "measure"):
        monkeypatch.setattr(stages, name, again)
    monkeypatch.setattr("idp_jax.formats.load_model", again)
    assert run(settings).variants == results.variants
    monkeypatch.undo()
    # One that is missing is.
    file = stages.result_file(settings, settings.variants[3])
    assert file.name == "short.json" and len(read(file).variants) == 1
    file.unlink()
    once_more = run(settings).variants
    assert once_more[3].perplexity == results.variants[3].perplexity and file.is_file()
    with pytest.raises(ConfigError, match="holds a run with seed = 0"):
        run(from_dict(Experiment, tree(settings.out.parent, seed=1)))


def test_without_variants_it_is_the_whole_grid():
    recipes = {"compressions": {"a": {}, "b": {"bits": 4}}, "adapters": ADAPTERS}
    grid = from_dict(Experiment, {"model": "m", "out": "o", **recipes})
    assert [row.name for row in grid.rows] == [
        "dense", "a", "b", "a + idp", "a + lora", "b + idp", "b + lora",
    ]  # fmt: skip
    names = {row.name: grid.reference(row) for row in grid.rows}
    assert names["dense"] is None and names["a"].name == "dense" and names["b + idp"].name == "b"
    # Adapters of one recipe are trained beside each model.
    first, second = (stages.adapter_of(grid, row) for row in (grid.rows[3], grid.rows[5]))
    assert first != second


BAD = {
    "compression": ({"variants": [Variant("x", "compressed", "five")]}, "no compression 'five'"),
    "adapter": (
        {"variants": [Variant("x", "repaired", None, "ldp/part")]},
        "variant 'x': no adapter 'ldp'; there are idp, lora",
    ),
    "selector": (
        {"variants": [Variant("x", "dense", selector="first")]},
        "a selector needs the adapter of a pool",
    ),
    "twice": ({"variants": [Variant("x", "dense"), Variant("x", "control")]}, "two are called 'x'"),
    "recipe": ({"adapters": {**ADAPTERS, "idp": {"rank": 2}}}, "adapters.idp: unknown key 'rank'"),
    "value": (
        {"compressions": {"four": {"bits": 5}}},
        r"compressions\.four: --bits 5 is not one of",
    ),
    "name": (
        {"variants": [Variant("x", "repaired", None, "idp", "best")]},
        "no selector 'best'; there are",
    ),
    "model": ({"model": "no/such/folder"}, "no/such/folder"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_made_is_said_first(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        run(from_dict(Experiment, tree(tmp_path, **changes)))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_the_demo_is_an_experiment_of_defaults():
    demo = Demo()
    assert [row.role for row in demo.rows] == [
        "dense", "compressed", "repaired", "repaired", "repaired", "control",
    ]  # fmt: skip
    stages.check(demo)
    assert demo.title == "smollm2-135m, gptq 3 bit group 64"


def test_the_command_shows_what_was_found(finished, capsys, monkeypatch):
    """On a finished experiment, so that nothing is computed."""
    settings, results, _ = finished
    monkeypatch.setattr("idp_jax.experiments.run", lambda *args, **options: results)
    main(["demo", "--model", settings.model, "--out", str(settings.out)])
    out = capsys.readouterr().out
    assert "long, random" in out and "extra params" in out and "chose: 2 tokens" in out
    assert "Perplexity surely lower than without adapter (95 %): " in out
    assert "short against small: accuracy " in out and "pool on dense against dense" in out
    assert "small against dense" not in out  # no adapter, nothing to boast of
    assert max(map(len, out.splitlines())) <= 120
