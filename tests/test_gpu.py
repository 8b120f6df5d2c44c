"""`make gpu`: parts as processes, each kept by itself, and one report; small ones on this CPU."""

import json
import sys

import pytest

from benchmarks import gpu
from idp_jax.cli import parse
from idp_jax.config import Compress, Evaluate

MACHINE = {"device": "NVIDIA H200", "jax": "1.2", "driver": "580"}
WORKS = gpu.Part("works", ("-c", "print('| a |\\n|---|\\n| 1 |')"))
FAILS = gpu.Part("fails", ("-c", "import sys; print('half'); sys.exit('no such kernel')"))
SLEEPS = gpu.Part("sleeps", ("-c", "import time; time.sleep(60)"))
LACKS = gpu.Part("lacks", ("-c", "1"), needs=("no_such_module",))
GOES_ON = gpu.Part("tune", ("-c", "import sys; print(sys.argv[1:])"), going_on=("--missing",))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs gpu.py with options: its exit status and what it prints."""
    monkeypatch.setattr(gpu, "_machine", lambda out, dry: dict(MACHINE))
    monkeypatch.setattr(gpu, "LIMIT", 2)

    def main(*options: str, parts=(FAILS, SLEEPS, LACKS, WORKS, GOES_ON)):
        monkeypatch.setattr(gpu, "every_part", lambda out: list(parts))
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), *options])
        return gpu.main(), capsys.readouterr().out

    return main


def test_what_fails_stops_nothing_and_is_said(run, tmp_path):
    status, said = run()
    assert status == 1 and "not done: fails, sleeps" in said
    report = (tmp_path / "report.md").read_text()
    assert "# On NVIDIA H200" in report and "| NVIDIA H200 | 1.2 | 580 |" in report
    assert "| fails | failed |" in report and "| lacks | skipped: no_such_module not ins" in report
    assert "| sleeps | stopped: not done after 2 s | 2" in report and "| works | done |" in report
    assert "## works\n\n| a |\n|---|\n| 1 |" in report and "no such kernel" in report
    assert "half" in report and json.loads((tmp_path / "works.json").read_text())["exit"] == 0


def test_what_is_done_is_not_run_again(run, tmp_path):
    parts = [WORKS, GOES_ON]
    assert run(parts=parts)[0] == 0
    assert "--missing" in (tmp_path / "tune.md").read_text()
    assert run(parts=parts)[1].count("done before") == 2
    said = run("--again", "tune", parts=parts)[1]
    assert said.count("done before") == 1 and (tmp_path / "tune.md").read_text() == "[]\n"
    MACHINE_NOW = {**MACHINE, "jax": "1.3"}
    file = tmp_path / "works.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "machine": MACHINE_NOW}))
    assert "works ... done" in run(parts=parts)[1]


def test_parts_are_chosen_and_time_is_kept(run):
    assert run("--only", "works")[1].count("done") == 2  # the part's, and the last line's
    status, said = run("--minutes", "0.0000001", "--only", "tune")
    assert status == 1 and "tune: waits" in said
    with pytest.raises(SystemExit, match="--only spede begins none of fails, sleeps"):
        run("--only", "spede")


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="no Hopper GPU here: jax finds cpu; .*--dry"):
        gpu.main()


def test_every_part_is_a_script_of_the_checkout(tmp_path):
    parts = gpu.every_part(tmp_path)
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    assert names[:2] == ["values-quant", "values-sparse24"]
    scripts = {part.command[0] for part in parts} - {"-c"}
    assert all((gpu.ROOT / script).exists() for script in scripts)
    assert sum(part.dry is not None for part in parts) == 5


def test_smollm2_is_asked_for_as_the_command_line_takes_it(tmp_path):
    parts = {p.name: p.command for p in gpu.every_part(tmp_path) if p.name.startswith("smollm2")}
    compress = parse(Compress, list(parts["smollm2-compress"][3:]), "compress")
    assert compress.model == "smollm2-135m" and compress.bits == 3
    for name, model in (("dense", compress.model), ("3bit", str(compress.out))):
        score = parse(Evaluate, list(parts[f"smollm2-eval-{name}"][3:]), "eval")
        assert score.model == model and score.task_names == ["knowledge"] and score.latency


_LONG = [pytest.param(n, marks=pytest.mark.slow) for n in ("speed", "decode", "step-prompt")]


@pytest.mark.parametrize("name", ["values-quant", *_LONG])
def test_a_part_runs_in_small(name, tmp_path):
    (part,) = [p for p in gpu.every_part(tmp_path) if p.name.startswith(name) and p.dry]
    ended = gpu.run_part(part, tmp_path, 120, dry=True, again=False)
    assert ended["status"] == "done", (tmp_path / f"{part.name}.log").read_text()
    assert (tmp_path / f"{part.name}.md").read_text().count("\n|") >= 2
