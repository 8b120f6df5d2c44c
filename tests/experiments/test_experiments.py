"""Experiments: the variants say what is made, and nothing is made twice."""

import dataclasses
import json

import pytest

from idp_jax.cli import main
from idp_jax.config import ConfigError, Demo, Experiment, Variant
from idp_jax.config.files import from_dict
from idp_jax.evaluation import compare, read
from idp_jax.experiments import measured, run, stages
from tests.evaluation.test_results import results, task, text, variant
from tests.helpers import tiny_folder

ADAPTERS = {
    "idp": {"method": "idp", "pool_lengths": [2, 4]},
    "prompt": {"method": "prompt", "prompt_length": 3, "objective": "kl"},
}
VARIANTS = [
    Variant("dense", "dense"),
    Variant("small", "compressed", "four"),
    Variant("pool, random", "repaired", "four", "idp", "random"),
    Variant("prompt on dense", "control", None, "prompt"),
]


pytestmark = pytest.mark.usefixtures("optax_promotes")


def tree(folder, **changes) -> dict:
    """An experiment of seconds, as a file would say it."""
    common = {"model": str(folder / "model"), "out": str(folder / "out"), "items": 1}
    sizes = {"sequence_length": 16, "calibration_windows": 2, "validation_windows": 4}
    training = {"train_tokens": 64, "batch_size": 2, "evaluate_every": 1, "cache_teacher": True}
    timing = {"prompt_length": 4, "new_tokens": 1, "repeats": 1}
    recipes = {"compression": {"group_size": 32}, "compressions": {"four": {"bits": 4}}}
    recipes |= {"adapters": ADAPTERS, "variants": VARIANTS, "tasks": "knowledge_arts"}
    return {**common, **sizes, **training, **recipes, "timing": timing, **changes}


@pytest.mark.slow
def test_what_the_variants_say_is_made_compared_and_not_made_twice(tmp_path, monkeypatch):
    """One run and one that goes on, in one test: the run is the slow part."""
    tiny_folder(tmp_path / "model", num_layers=1, max_positions=512)
    settings, said = from_dict(Experiment, tree(tmp_path)), []
    results = run(settings, begin=said.append)
    assert said == [
        "text", "compression: four", "adapter: idp on four", "adapter: prompt on dense",
        "evaluation: dense", "evaluation: small", "evaluation: pool, random",
        "evaluation: prompt on dense",
    ]  # fmt: skip
    assert read(settings.out / "results.json") == results
    check_variants(settings, results)
    check_going_on(settings, results, monkeypatch)
    check_what_was_changed(settings)


def check_variants(settings, results):
    """Every variant in its role, measured, and compared with its own model."""
    assert [(row.name, row.role) for row in results.variants] == [
        (row.name, row.role) for row in VARIANTS
    ]
    dense, small, pool, control = results.variants
    assert dense.model == settings.model and dense.extra_parameters == 0
    assert small.model == pool.model == str(settings.out / "models" / "four")
    assert pool.prompt_lengths == [2, 4] and pool.extra_parameters == 6 * 64
    assert pool.selector == "random" and sum(pool.choices) == 1
    assert control.prompt_lengths == [3] and control.model == settings.model
    assert all(row.latency and row.perplexity.windows == 2 for row in results.variants)
    report = json.loads((settings.out / "models" / "four" / "compression.json").read_text())
    assert report["config"]["bits"] == 4 and report["config"]["group_size"] == 32
    assert (settings.out / "figure.png").stat().st_size > 1000
    assert (settings.out / "teacher" / "default" / "cache.json").is_file()
    assert [(pair.first, pair.second) for pair in results.comparisons] == [
        ("dense", "small"),
        ("small", "pool, random"),
        ("dense", "prompt on dense"),
    ]
    assert all(pair.perplexity_ratio and pair.overall for pair in results.comparisons)


def check_going_on(settings, results, monkeypatch):
    """Nothing that is there is made again; what is missing is, alike."""
    again = lambda *args, **options: pytest.fail("a finished stage ran again")
    with monkeypatch.context() as patched:
        for place, name in ((stages, "sample_documents"), (measured, "measure")):
            patched.setattr(place, name, again)
        patched.setattr("idp_jax.experiments.once.compress", again)
        patched.setattr("idp_jax.formats.load_model", again)
        assert run(settings).variants == results.variants
    file = measured.result_file(settings, settings.variants[2])
    assert file.name == "pool_random.json" and len(read(file).variants) == 1
    file.unlink()
    once_more = run(settings).variants
    assert once_more[2].perplexity == results.variants[2].perplexity and file.is_file()
    with pytest.raises(ConfigError, match="holds a run with seed = 0"):
        run(from_dict(Experiment, tree(settings.out.parent, seed=1)))
    file.write_text("{")
    assert run(settings).variants[2].perplexity == results.variants[2].perplexity


def check_what_was_changed(settings):
    """A finished stage whose files are others is named; numbers of another adapter are not kept."""
    for place, said in (
        ("out/models/four/config.json", "config.json is not as this experiment wrote it; remove"),
        ("out/text/test.jsonl", "test.jsonl is not as this experiment wrote it; remove"),
        ("out/adapters/dense/prompt/adapter/adapter_config.json", "is not as this run wrote it"),
        ("model/tokenizer.json", "another model: tokenizer.json has changed since"),
    ):
        file = settings.out.parent / place
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        with pytest.raises(ConfigError, match=said):
            run(settings)
        file.write_bytes(before)


def test_without_variants_it_is_the_whole_grid():
    recipes = {"compressions": {"a": {}, "b": {"bits": 4}}, "adapters": ADAPTERS}
    grid = from_dict(Experiment, {"model": "m", "out": "o", **recipes})
    assert [row.name for row in grid.rows] == [
        "dense", "a", "b", "a + idp", "a + prompt", "b + idp", "b + prompt",
    ]  # fmt: skip
    names = {row.name: grid.reference(row) for row in grid.rows}
    assert names["dense"] is None and names["a"].name == "dense" and names["b + idp"].name == "b"
    # Adapters of one recipe are trained beside each model.
    first, second = (stages.adapter_of(grid, row) for row in (grid.rows[3], grid.rows[5]))
    assert first != second
    part = Variant("short", "repaired", "a", "idp/prompt_0_2_tokens")
    assert stages.adapter_of(grid, part) == first / "prompt_0_2_tokens"


BAD = {
    "compression": ({"variants": [Variant("x", "compressed", "five")]}, "no compression 'five'"),
    "adapter": (
        {"variants": [Variant("x", "repaired", None, "ldp/part")]},
        "variant 'x': no adapter 'ldp'; there are idp, prompt",
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
    "place": ({"compressions": {"four": {"out": "x"}}}, "compressions.four: out is the same for"),
    "data": ({"adapters": {**ADAPTERS, "idp": {"data": {}}}}, "adapters.idp: data is the same fo"),
    "list": ({"adapters": {**ADAPTERS, "idp": {"optimizer": 1}}}, "adapters.idp: optimizer"),
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
        "dense", "compressed", "repaired", "repaired", "repaired", "control", "control",
    ]  # fmt: skip
    stages.check(demo)
    assert demo.title == "smollm2-135m, gptq 3 bit group 64"


def test_the_command_shows_what_was_found(capsys, monkeypatch):
    lower = text((2.0, 2.5, 3.0))
    rows = [
        variant("bare", role="compressed", adapter=None, tasks={"g_t": task(choices=None)}),
        variant("pool", tasks={"g_t": task()}, perplexity=lower),
        variant("other", role="control", tasks={"g_t": task()}),
    ]
    found = results(*rows, comparisons=[compare(rows[0], row) for row in rows[1:]])
    found = dataclasses.replace(found, environment={"device": "cpu", "cpu_cores": 2})
    monkeypatch.setattr("idp_jax.experiments.run", lambda *args, **options: found)
    main(["demo", "--model", "m", "--out", "o"])
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    same = ["+0.0 [+0.0, +0.0]", "unclear"]
    assert ["pool", "bare", *same, "0.368 [0.368, 0.368]", "lower"] in cells
    assert ["other", "bare", *same, "1.000 [1.000, 1.000]", "unclear"] in cells
    assert "pool chose: 3 tokens 1x, 5 tokens 2x.\n" in out
    assert "other chose" not in out  # a control
    assert "│ t " in out  # the group's name is in the title
    assert max(map(len, out.splitlines())) <= 120
