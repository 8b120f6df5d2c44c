"""Jobs of seconds on a tiny random model, one of every kind, for the scripts that disturb them."""

import json
from collections.abc import Callable
from pathlib import Path

from random_model import opt_config, write_model, write_text

_LENGTH = 32
SAVE = """
import sys
from idp_jax import load_model, save_model

try:
    save_model(load_model(sys.argv[1]), sys.argv[2], like=sys.argv[1])
except (ValueError, OSError) as error:
    sys.exit(f"idp-jax: {' '.join(str(error).split())}")
"""


def write_inputs(folder: Path, *, layers: int = 4, width: int = 64) -> None:
    """Writes `model` and `text.txt`."""
    write_model(folder / "model", opt_config(layers, width, 512, 4 * _LENGTH))
    write_text(folder / "text.txt", 512, 40 * _LENGTH)


def jobs(inputs: Path) -> dict[str, Callable[[Path], list]]:
    """By name, the arguments of a command that writes to a given place."""
    model, text = inputs / "model", inputs / "text.txt"
    calibrated = ["--calibration", text, "--samples", 4, "--sequence-length", _LENGTH]
    data = ["--data.train", text, "--data.sequence-length", _LENGTH]
    few = ["--data.validation-windows", 2, "--tokens", 20 * 2 * _LENGTH, "--evaluate-every", 5]
    scored = ["--perplexity", text, "--sequence-length", _LENGTH]
    return {
        "compress": lambda out: [
            "compress",
            model,
            "--out",
            out,
            "--allow-worse",
            ".",
            *calibrated,
        ],
        "convert": lambda out: ["convert", model, "--to", "dense", "--out", out],
        "train": lambda out: ["train", "--model", model, "--out", out, *data, *few],
        "eval": lambda out: ["eval", "--model", model, "--out", out, *scored],
    }


def result(place: Path) -> dict[str, bytes]:
    """Every file of a result by name, less what a clock or a folder's name is in."""
    if place.is_file():
        return {place.name: json.dumps(json.loads(place.read_text())["variants"]).encode()}
    own = ("compression.json", "compression.png", ".idp-jax.json", "config.yaml", "result.json")
    own += ("timing.jsonl",)
    files = (file for file in sorted(place.rglob("*")) if file.is_file())
    return {
        str(file.relative_to(place)): file.read_bytes()
        for file in files
        if file.name not in own and "checkpoints" not in file.parts
    }
