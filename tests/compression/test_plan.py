"""What a job is said to take, and what is shown of what it did."""

import json

import pytest
from rich.console import Console

from idp_jax.cli import main
from idp_jax.commands.tables import compression_table, plan_table
from idp_jax.compression import plan as plan_module
from idp_jax.compression import report
from idp_jax.compression.driver import resolve_settings
from idp_jax.compression.plan import plan
from idp_jax.config import Compress, Mesh
from tests.helpers import hf_config, tiny_config

WORK = {"forward", "Hessian", "factor", "sweep", "errors", "grids", "compilation"}
RATES = dict.fromkeys(WORK, 1e9)


def planned(**other):
    """The plan of a small job."""
    config = tiny_config("llama")
    settings = Compress(**{"model": "m", "group_size": 32, "samples": 4, **other})
    return plan(config, settings, resolve_settings(config, settings))


def lines(shown) -> list[str]:
    """A table as text."""
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))
    with console.file:
        console.print(shown)
        return console.export_text().splitlines()


def test_every_kind_of_work_and_memory_is_counted():
    counted = planned()
    assert set(counted.work) == WORK and all(work > 0 for work in counted.work.values())
    assert counted.devices == 1 and min(counted.device.values()) >= 0
    # q, k, v, o, gate, up, down of two layers, at 3 bits and a scale and zero in every 32.
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert counted.disk == pytest.approx(weights * (3 + 19 / 32) / 8, rel=1e-3)
    assert counted.work["grids"] == 2 * weights  # the baseline's, too
    assert counted.work["compilation"] == 4  # a program for each stage
    doubled = planned(samples=8)
    assert doubled.work["Hessian"] == 2 * counted.work["Hessian"]
    assert doubled.work["sweep"] == counted.work["sweep"]
    assert (
        doubled.device["residual streams, twice"] == 2 * counted.device["residual streams, twice"]
    )


def test_without_text_there_are_no_streams():
    counted = planned(method="rtn")
    assert set(counted.device) == {"one block's weights", "a stage's matrices"}
    assert counted.work["forward"] == counted.work["Hessian"] == 0
    assert planned(method="magnitude").disk == 2 * 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)


def test_devices_share():
    alone, cut = planned(), planned(mesh=Mesh(data=2, model=4))
    assert cut.devices == 8
    assert cut.device["residual streams, twice"] * 2 == alone.device["residual streams, twice"]
    assert cut.device["one block's weights"] * 4 == alone.device["one block's weights"]
    by_data = planned(mesh=Mesh(data=8))
    assert by_data.device["Hessian and its factor"] == alone.device["Hessian and its factor"]


def test_the_table_adds_up():
    counted = planned(samples=128, sequence_length=2048)
    shown = lines(plan_table(counted, "a title", RATES))
    assert "a title" in shown[0]
    amount = lambda name: float(next(line for line in shown if name in line).split("│")[2])
    for place, held in (("on the device", counted.device), ("on the host", counted.host)):
        assert amount(place) == pytest.approx(sum(map(amount, held)), abs=0.005 * len(held) + 0.006)
    assert amount("at most, on a CPU") == pytest.approx(counted.peak / 1e9, abs=0.006)
    assert sum("at 1 G/s" in line for line in shown) == len(WORK) - 1
    assert "in all" in shown[-2] and "[bold]" not in "".join(shown)


def test_rates_are_measured_on_what_the_job_runs():
    found = plan_module.rates(batch=64, width=128)
    assert set(found) == WORK and min(found.values()) > 0


@pytest.fixture
def folder(tmp_path):
    """Nothing but a configuration."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(hf_config(tiny_config("llama")).to_dict())
    )
    return tmp_path


def test_a_plan_needs_a_configuration_alone(folder, monkeypatch, capsys):
    monkeypatch.setattr("idp_jax.commands.compress.rates", lambda: RATES)
    before = sorted(folder.rglob("*"))
    main(["compress", str(folder / "model"), "--plan", "--group-size", "32"])
    said = capsys.readouterr().err
    assert "on the device" in said and "in all" in said
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(SystemExit):
        main(["compress", str(folder / "model"), "--plan", "--group-size", "48"])
    assert "--group-size 48 does not divide" in capsys.readouterr().err


ROWS = [
    {
        "layer": layer,
        "matrix": name,
        "module": f"{layer}.{name}",
        "method": "gptq",
        "bits": 3 + layer,
        "group_size": -1 if layer else 64,
        "relative_error": 0.1 * (layer + 1),
        "baseline_error": 0.4,
        "damping": 0.01 * 10**layer,
        "retries": layer,
        "dead_columns": 2,
    }
    for layer in range(2)
    for name in ("q", "down")
]
SKIPPED = {"layer": 0, "matrix": "k", "module": "0.k", "method": "skip"}


def test_the_report_is_shown_by_matrix():
    shown = lines(compression_table([*ROWS, SKIPPED], "a title"))
    q = next(line for line in shown if line.startswith("│ q "))
    for word in ("gptq 3 bit, group 64", "gptq 4 bit, row", "0.15", "0.4", "0.1", "1", "4"):
        assert word in q
    k = next(line for line in shown if line.startswith("│ k "))
    assert "skip" in k and not any(character.isdigit() for character in k)


# Of two matrices one ends without any error, and has no baseline either.
UNMOVED = [
    {"layer": 0, "matrix": "q", "relative_error": 0.0},
    {"layer": 0, "matrix": "down", "relative_error": 0.1},
]


@pytest.mark.parametrize(
    "rows",
    [UNMOVED[:1], ROWS, [*ROWS, SKIPPED], ROWS[:1], [{**ROWS[0], "relative_error": 0.0}], UNMOVED],
)
def test_the_picture(tmp_path, rows):
    report.draw(rows, "a title", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_measured_nothing_drawn(tmp_path):
    report.draw([SKIPPED], "a title", tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())
