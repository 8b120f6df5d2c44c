"""The commands from end to end on a tiny model, and one line for everything that goes wrong."""

import itertools
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

import idp_jax
from idp_jax import load_adapter, load_model
from idp_jax.cli import COMMANDS, main
from idp_jax.config import ConfigError
from idp_jax.evaluation import compare, read
from idp_jax.formats import save_adapter
from idp_jax.recover import SoftPrompt
from idp_jax.weights import Quantized
from tests.helpers import tiny_decoder, tiny_folder, tiny_ids

ROOT = Path(__file__).parents[1]
WORDS = ("tide ", "ship ", "lamp ", "rock ", "keeper ", "storm. ")


pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of one layer, another model's adapter, a text, and a settings file."""
    folder = tmp_path_factory.mktemp("files")
    tiny_folder(folder / "model", num_layers=1)
    other = tiny_decoder("llama", num_layers=1, hidden_dim=32, vocab_size=259)
    prompt = SoftPrompt.init(other, 3, jax.random.key(0))
    save_adapter(prompt, folder / "adapter", decoder=other)
    words = np.random.default_rng(0).choice(WORDS, 400)
    (folder / "text.txt").write_text("".join(words))
    (folder / "short.txt").write_text("tide")
    (folder / "train.yaml").write_text(
        f"model: {folder / 'model'}\nbatch_size: 2\nprompt_length: 4\ntokens: 128\n"
        f"data: {{train: {folder / 'text.txt'}, validation_windows: 2, sequence_length: 32}}\n"
    )
    (folder / "bad.yaml").write_text("model: m\nout: o\nbitz: 3\n")
    (folder / "taken").mkdir()
    (folder / "taken" / "file").touch()
    return folder


def run(*arguments) -> None:
    """One command in this process."""
    main([str(argument) for argument in arguments])


def calibration(files, samples: int = 4, length: int = 32) -> list:
    """Options for a little text."""
    text = files / "text.txt"
    return ["--calibration", text, "--samples", samples, "--sequence-length", length]


def test_from_a_model_to_a_score(files, tmp_path, capsys):
    small, trained = tmp_path / "small", tmp_path / "trained"
    compressing = ["compress", files / "model", "--out", small, "--bits", 4, "--group-size", 32]
    run(*compressing, *calibration(files))
    report = json.loads((small / "compression.json").read_text())
    assert [row["matrix"] for row in report["matrices"]] == [
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
    ]
    assert report["config"]["bits"] == 4 and report["environment"]["jax"]
    model = load_model(small)
    assert isinstance(model.layers.q, Quantized) and model.layers.q.bits == 4
    assert "compilation included" in capsys.readouterr().err

    config = ["--config_path", files / "train.yaml", "--model", small, "--out", trained]
    run("train", *config)
    result = json.loads((trained / "result.json").read_text())
    assert result["extra_parameters"] == 4 * 64 and result["training_tokens"] == 128
    metrics = (trained / "metrics.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in metrics.splitlines()]
    assert steps == [0, 1, 2, 2]
    said = capsys.readouterr().err
    assert "best validation perplexity" in said and "256 parameters, 128 tokens" in said
    repaired = load_adapter(model, trained / "adapter")
    assert repaired(tiny_ids(model)).shape == (2, 12, 259)

    scoring = ["eval", "--model", small, "--perplexity", files / "text.txt", "--windows", 3]
    scoring += ["--sequence-length", 32]
    run(*scoring, "--out", tmp_path / "plain.json")
    run(*scoring, "--out", tmp_path / "r.json", "--adapter", trained / "adapter")
    plain, repaired = (read(tmp_path / name).variants[0] for name in ("plain.json", "r.json"))
    assert (plain.role, repaired.role) == ("compressed", "repaired")
    assert plain.perplexity.windows == repaired.perplexity.windows == 3
    assert plain.perplexity.perplexity != repaired.perplexity.perplexity > 1
    assert repaired.adapter == str(trained / "adapter") and repaired.extra_parameters == 4 * 64
    assert compare(tmp_path / "plain.json", tmp_path / "r.json").perplexity_ratio.value > 0
    # A run that is complete is only reported.
    run("train", *config)
    assert json.loads((trained / "result.json").read_text()) == result


def test_zeros_and_text_of_the_models_own(tmp_path):
    model, out = tiny_folder(tmp_path / "model", num_layers=1, max_positions=32), tmp_path / "out"
    few = ["--samples", 2, "--sequence-length", 16, "--sparsity", "2:4"]
    run("compress", model, "--out", out, "--method", "sparsegpt", *few)
    kernel = np.asarray(load_model(out).layers.up.kernel[...])
    assert ((kernel == 0).reshape(1, -1, 4, kernel.shape[-1]).sum(2) == 2).all()
    rounding = ["--method", "rtn", "--group-size", -1, "--overwrite"]
    run("compress", model, "--out", out, *rounding)
    assert load_model(out).layers.up.bits == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def compressing(files, out, *options) -> list:
    """A compression that would work but for `options`, which come last and win."""
    few = [*calibration(files), "--group-size", 32]
    return ["compress", files / "model", "--out", out, *few, *options]


def training(files, out, *options) -> list:
    """A training run that would work but for `options`."""
    return ["train", "--config_path", files / "train.yaml", "--out", out, *options]


def scoring(files, out, *options) -> list:
    """An evaluation that would work but for `options`."""
    text = ["--perplexity", files / "text.txt", "--sequence-length", 32]
    return ["eval", "--model", files / "model", "--out", out, *text, *options]


BAD = {
    "command": (lambda f, o: ["quantize", "--out", o], "no command 'quantize'; there are demo, "),
    "no-model": (
        lambda f, o: ["compress", f / "none", "--out", o],
        "none: give an existing folder",
    ),
    "no-arguments": (lambda f, o: ["compress"], "model"),
    "unknown-option": (lambda f, o: compressing(f, o, "--bit", 3), "--bit"),
    "bits": (lambda f, o: compressing(f, o, "--bits", 5), "--bits 5 is not one of 2, 3, 4, 8"),
    "group": (
        lambda f, o: compressing(f, o, "--group-size", 48),
        "--group-size 48 does not divide the 64 inputs of model.layers.0.self_attn.q_proj; "
        "use 32, 64, -1, or a rule for this matrix",
    ),
    "short-calibration": (
        lambda f, o: compressing(f, o, "--calibration", f / "short.txt"),
        "short.txt gives 0 of the 4 windows of 32 tokens asked for",
    ),
    "no-calibration": (
        lambda f, o: compressing(f, o, "--calibration", f / "none.txt"),
        "none.txt; check the path",
    ),
    "long-windows": (
        lambda f, o: compressing(f, o, "--sequence-length", 257),
        "--sequence-length 257 exceeds the model's 256 positions",
    ),
    "not-a-model": (
        lambda f, o: ["compress", f / "text.txt", "--out", o],
        "text.txt is neither a model folder nor a .gguf file",
    ),
    "taken": (lambda f, o: compressing(f, f / "taken"), "taken exists; give another folder, or"),
    "unknown-key": (
        lambda f, o: ["compress", "--config_path", f / "bad.yaml"],
        "bad.yaml: unknown key 'bitz'",
    ),
    "no-file": (
        lambda f, o: ["train", "--config_path", f / "none.yaml", "--out", o],
        "none.yaml cannot be read: No such file",
    ),
    "mesh": (
        lambda f, o: compressing(f, o, "--mesh.data", 3),
        "does not use 8 devices; its sizes must multiply to that number",
    ),
    "train-no-model": (
        lambda f, o: training(f, o, "--model", f / "none"),
        "none: give an existing folder",
    ),
    "train-short": (
        lambda f, o: training(f, o, "--data.train", f / "short.txt"),
        "short.txt gives 0 windows of 32 tokens, too few to train on when 2 are held out",
    ),
    "train-taken": (lambda f, o: training(f, f / "taken"), "taken exists and holds no run"),
    "train-tokens": (
        lambda f, o: training(f, o, "--tokens", 10),
        "--tokens 10 is less than one step of 64 tokens",
    ),
    "adapter": (
        lambda f, o: scoring(f, o, "--adapter", f / "adapter"),
        "adapter was made for another model: it has token_dim 32, this model needs",
    ),
    "no-adapter": (
        lambda f, o: scoring(f, o, "--adapter", f / "none"),
        "none holds no adapter_config.json",
    ),
    "out-is-a-folder": (lambda f, o: scoring(f, f / "taken"), "taken is a folder; give a file"),
    "nothing": (
        lambda f, o: ["eval", "--model", f / "model", "--out", o],
        "nothing to evaluate: give --tasks",
    ),
    "short-perplexity": (
        lambda f, o: scoring(f, o, "--perplexity", f / "short.txt"),
        "the text has 0 windows of 32 tokens, 1 are asked for",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_done_is_said_in_one_line(files, tmp_path, capsys, arguments, message):
    before = sorted(files.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run(*arguments(files, tmp_path / "out"))
    assert stop.value.code not in (0, None)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip() and "━" not in line]
    assert len(lines) == 1 and lines[0].startswith("idp-jax: ") and message in lines[0], err
    assert out == "" and "Traceback" not in err
    assert not list(tmp_path.iterdir())
    assert sorted(files.rglob("*")) == before


def test_another_run_in_the_same_folder(files, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        run(*training(files, tmp_path / "out", "--data.train", files / "short.txt"))
    run(*training(files, tmp_path / "out", "--method", "lora", "--lora.rank", 2))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*training(files, tmp_path / "out", "--method", "lora", "--lora.rank", 3))
    assert stop.value.code == 2
    assert "holds a run with lora.rank = 2, this one has 3" in capsys.readouterr().err


TORCH_STAYS = """
import sys
from idp_jax.cli import _hide_torch

_hide_torch()
from transformers import AutoConfig, AutoTokenizer

assert AutoConfig.from_pretrained(sys.argv[1]).hidden_size == 64
assert len(AutoTokenizer.from_pretrained(sys.argv[1])) == 259
assert "torch" not in sys.modules
import importlib.util

assert importlib.util.find_spec("torch", package=None).name == "torch"
import torch

assert torch.__version__ == "9.9.9"
"""


def test_transformers_leaves_torch_alone(files, tmp_path):
    """With a package of that name installed, which works all the same when it is imported."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '9.9.9'\n")
    (tmp_path / "torch-9.9.9.dist-info").mkdir()
    (tmp_path / "torch-9.9.9.dist-info" / "METADATA").write_text("Name: torch\nVersion: 9.9.9\n")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", TORCH_STAYS, str(files / "model")],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["train", "--help"]])
def test_help_is_not_an_error(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert "idp-jax" in out and err == ""


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"idp-jax {idp_jax.__version__}\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == idp_jax.__version__


LIGHT = """
import sys
from idp_jax.cli import main

try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert stop.code == 0
heavy = {"jax", "transformers", "numpy", "pydantic", "datasets", "lm_eval"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_waits_for_no_import(command):
    words = ["--help"] if command is None else [command, "--help"]
    subprocess.run([sys.executable, "-c", LIGHT, *words], check=True, cwd=ROOT)


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_breaks_lines_only_where_they_end(command, width, monkeypatch, capsys):
    """No line of an option's help stops early: the next word would not have fitted."""
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    texts = [line.strip("│").rstrip() for line in lines if line.startswith("│")]
    for line, following in itertools.pairwise(texts):
        continues = following.startswith(" " * 6) and "(default:" not in following.lstrip()[:1]
        text_begins = len(following) - len(following.lstrip())
        if continues and len(line) > text_begins and line[text_begins - 1] == " ":
            word = following.split()[0]
            fits = len(line) + 1 + len(word) <= width - 3
            # The default stays together with its bracket.
            assert not fits or word.startswith("(default"), (line, following)


def test_the_list_of_commands_fits_a_terminal(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in out if line.startswith("  ")}
    assert list(rows) == list(COMMANDS)
    assert all(len(row) <= 80 and row.endswith(".") for row in rows.values())


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PermissionError(13, "Permission denied", "a/b"), 1, "idp-jax: a/b: Permission denied"),
        (ConfigError("one\n  two"), 2, "idp-jax: one two"),
    ],
)
def test_failures_inside_a_command(monkeypatch, capsys, error, code, message):
    def fail(settings):
        raise error

    monkeypatch.setattr("idp_jax.commands.compress.run", fail)
    with pytest.raises(SystemExit) as stop:
        run("compress", "m", "--out", "o")
    assert stop.value.code == code
    assert capsys.readouterr().err.startswith(message)


def test_scripts_are_commands(monkeypatch, capsys):
    import runpy

    for script, word in (("train.py", "train"), ("eval.py", "eval")):
        monkeypatch.setattr("sys.argv", [script, "--help"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert stop.value.code == 0 and f"idp-jax {word}" in capsys.readouterr().out
