"""A grid: cells that go on, in any part and order, and tables that are a function of them alone."""

import shutil

import pytest

from idp_jax.config import Reproduce
from idp_jax.config.files import from_dict, to_dict
from idp_jax.evaluation import read
from idp_jax.experiments import grid, run_grid
from idp_jax.jobs.lock import locked
from idp_jax.jobs.signals import Interrupted
from tests.experiments.test_sweep import Stopping, sources, write_documents

pytestmark = pytest.mark.usefixtures("optax_promotes")
__all__ = ["sources", "write_documents"]

RECIPES = {
    "lora": {"method": "lora", "lora": {"rank": 1, "targets": ["q"]}},
    "idp": {"method": "idp", "pool_lengths": [2, 3]},
}
TABLES = ("grid.md", "grid.tex", "grid.csv")
FIGURES = ("grid.png", "recovery.png", "choices.png")


def tree(folder, **changes) -> dict:
    """A grid of seconds, as a file would say it."""
    data = {"train": str(folder / "train.jsonl"), "held_out": folder / "held.jsonl"}
    data |= {"second": folder / "second.jsonl", "sequence_length": 16, "calibration_windows": 2}
    data |= {"choosing_windows": 2, "reported_windows": 3}
    common = {"models": [str(folder / "model")], "out": "out", "data": data, "items": 1}
    common |= {"compression": {"group_size": 32}, "recipes": RECIPES, "dense": ["lora"]}
    common |= {"compressions": {"four": {"bits": 4}, "half": {"method": "magnitude"}}}
    common |= {"tasks": "knowledge_arts,knowledge_authors", "tokens": 64, "batch_size": 2}
    return common | {"evaluate_every": 1, "seeds": [1, 2]} | changes


def made(out) -> dict[str, bytes]:
    """The tables of a grid."""
    return {name: (out / name).read_bytes() for name in TABLES}


@pytest.mark.slow
def test_a_grid_ends_with_the_same_tables_however_it_is_done(sources, tmp_path, monkeypatch):
    """Stopped in trainings and gone on; in two parts, beside another call."""
    tables = {}
    for name, first in (("stopped", run_stopped), ("parts", run_part)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        first(sources)
        settings = from_dict(Reproduce, tree(sources))
        found = run_grid(settings)
        assert found is not None and not found.missing
        tables[name] = made(settings.out)
    assert tables["stopped"] == tables["parts"]
    check_whole(settings, found)
    check_nothing_is_done_twice(settings, found, monkeypatch)


def run_stopped(sources):
    """Two calls that are stopped in a training."""
    for stops in ((3,), (12,)):
        with pytest.raises(Interrupted):
            run_grid(from_dict(Reproduce, tree(sources)), progress=Stopping(*stops))


def run_part(sources):
    """The second half, beside another call that works on one of its cells."""
    settings, said = from_dict(Reproduce, tree(sources, cells="2/2")), []
    taken = settings.chosen_cells()[0]
    with locked(taken.settings.out):
        found = run_grid(settings, say=said.append)
    assert len([line for line in said if line.startswith("cell ")]) == 3
    assert sum("passed over: " in line and "is being written by" in line for line in said) == 1
    assert len(found.missing) == 4 and taken.name in found.missing
    assert "not finished: " in (settings.out / "grid.md").read_text()


def check_whole(settings, found):
    """Every row is there, paired with its reference, and the controls are what they are called."""
    assert all((settings.out / name).stat().st_size > 1000 for name in FIGURES)
    names = [row.name for row in found.rows]
    own = ["", " + lora", " + idp"]
    controls = [f" + idp, {name}" for name in settings.controls]
    assert names == ["dense", "dense + lora"] + [
        model + rest for model in ("four", "half") for rest in own + controls
    ]
    rows = {row.name: row for row in found.rows}
    assert all(row.seeds == [1, 2] for row in found.rows)
    assert rows["four"].change.first == "dense" and rows["four + lora"].change.first == "four"
    assert rows["four + lora"].share is not None and rows["dense + lora"].share is None
    assert set(found.at_chance[settings.models[0]]) == set(rows["four"].tasks)
    # One prompt of the summed length, on the tokens of both.
    assert rows["four + idp, summed"].parameters == rows["four + idp"].parameters == 5 * 64
    for row in found.rows:
        assert set(row.tasks) == {"knowledge_arts", "knowledge_authors"}
        assert row.mean is None  # of two items everything is at chance
        assert row.second_perplexity is not None
    for model in ("four", "half"):
        check_bounds(settings, model, rows)
        pairs = found.contrasts[str(settings.models[0]), model]
        assert [pair.first for pair in pairs] == [f"{model}{rest}" for rest in controls]
        assert {pair.second for pair in pairs} == {f"{model} + idp"}


def check_bounds(settings, model, rows):
    """No choice is better than the oracle; the best fixed prompt is one of the two."""
    bound = rows[f"{model} + idp, oracle"]
    for name in ("idp", "idp, random", "idp, best-fixed"):
        row = rows[f"{model} + {name}"]
        assert bound.perplexity <= row.perplexity
        assert all(bound.tasks[task].value >= row.tasks[task].value for task in row.tasks)
    cell = next(cell for cell in settings.all_cells() if cell.compression == model)
    results = read(cell.settings.out / "results.json")
    fixed = results.variant(f"{model} + idp, best-fixed")
    kept = [read(file) for file in (cell.settings.out / "evaluation").glob("*prompt_*.json")]
    assert len(kept) == 2
    assert fixed.perplexity in [each.variants[0].perplexity for each in kept]


def check_nothing_is_done_twice(settings, found, monkeypatch):
    """A finished grid only reads its results; a cell that is removed is made again, alike."""
    before, said = made(settings.out), []
    with monkeypatch.context() as patched:
        patched.setattr(grid, "run", lambda *args, **options: pytest.fail("a cell ran again"))
        assert run_grid(settings, say=said.append) == found
        planned = from_dict(Reproduce, {**to_dict(settings), "plan": True})
        assert run_grid(planned, say=said.append) is None
    assert said[-1].startswith("0 cells to do of 6: 0 trainings, 0 tokens")
    shutil.rmtree(settings.all_cells()[-1].settings.out)
    assert run_grid(settings) == found and made(settings.out) == before
