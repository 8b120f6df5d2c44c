"""Presets: what each says is pinned, and where it stands between defaults, files and options."""

from pathlib import Path

import pytest
import yaml

from idp_jax.cli import main, parse
from idp_jax.config import Compress, ConfigError, Train
from idp_jax.config.files import from_dict, from_yaml, to_dict
from idp_jax.config.presets import PRESETS, read_preset

FILES = Path(__file__).parents[2] / "configs" / "presets"
NEEDED = ["--model", "m", "--out", "o"]
TAUGHT = ("cartridge", "rilq", "intactkv", "qad-prompt")

# method, objective, start (tokens, model, frozen), learning rate, steps, what is trained
PINNED = {
    "paper": (
        *("idp", "ce", ("vocabulary", "compressed", 0), 1e-3, 20_000),
        {"pool_lengths": (25, 100), "selector": "mean_attention"},
    ),
    "xu2023": (
        *("prompt", "ce", ("vocabulary", "compressed", 0), 1e-3, 30_000),
        {"prompt_length": 100},
    ),
    "cartridge": (
        *("prefix", "kl", ("text", "compressed", 1), 2e-2, 4_096),
        {"prompt_length": 2048},
    ),
    "rilq": (
        *("lora", "0.5*hidden_mse + 0.5*ce", ("vocabulary", "compressed", 0), 1e-4, 32),
        {},
    ),
    "intactkv": ("prefix", "ce", ("text", "teacher", 1), 1e-3, 0, {"prompt_length": 1}),
    "qad-prompt": (
        *("prompt", "kl", ("vocabulary", "compressed", 0), 1e-2, 64),
        {"prompt_length": 50},
    ),
}
SCHEDULES = {
    "paper": ("linear", 0.05),
    "xu2023": ("linear", 500 / 30_000),
    "cartridge": ("linear", 0.05),
    "rilq": ("constant", None),
    "intactkv": (None, None),
    "qad-prompt": ("cosine", 0.05),
}


def preset(name: str, *options: str) -> Train:
    teacher = ["--teacher.model", "dense"] if name in TAUGHT else []
    return parse(Train, [*NEEDED, *teacher, "--preset", name, *options], "train")


def test_every_file_is_a_preset_and_every_preset_is_pinned():
    assert {path.stem for path in FILES.glob("*.yaml")} == set(PRESETS) == set(PINNED)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_recipe_of_its_source(name):
    config = preset(name)
    method, objective, start, rate, steps, rest = PINNED[name]
    assert (config.method, config.objective) == (method, objective)
    assert (config.init.tokens, config.init.model, config.init.frozen_tokens) == start
    assert (config.learning_rate, config.steps) == (rate, steps)
    schedule, warmup = SCHEDULES[name]
    assert schedule is None or config.optimizer.schedule == schedule
    assert warmup is None or config.optimizer.warmup == pytest.approx(warmup, rel=1e-3)
    assert config.optimizer.weight_decay == 0
    for key, value in rest.items():
        assert getattr(config, key) == value


def test_what_else_the_recipes_say():
    paper, rilq, cartridge = map(preset, ("paper", "rilq", "cartridge"))
    assert paper.lora.targets == ("q", "v") and (paper.lora.rank, paper.lora.alpha) == (8, 16)
    assert preset("paper", "--method", "lora").learning_rate == 1e-4
    assert rilq.lora.targets == ("q", "k", "v", "o", "gate", "up", "down")
    assert (rilq.lora.rank, rilq.lora.alpha) == (64, 16)
    assert (rilq.tokens, rilq.evaluate_every, rilq.patience) == (131_072, 25, 5)
    assert (cartridge.teacher.form, cartridge.teacher.tokens) == ("topk", 20)
    assert cartridge.teacher.temperature == 1 and preset("qad-prompt").teacher.form == "full"


@pytest.mark.parametrize("name", PRESETS)
def test_its_source_is_printed_and_its_command_is_its_own(name, capsys):
    assert read_preset(name).source and "\n" not in read_preset(name).source
    preset(name)
    assert capsys.readouterr().err == f"preset {name}: {read_preset(name).source}\n"
    first = (FILES / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith(f"# idp-jax train --preset {name} --model MODEL ")
    assert ("--teacher.model" in first) == (name in TAUGHT)


def test_options_beat_the_file_and_the_file_beats_the_preset(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("optimizer: {schedule: linear, clip_norm: 2.0}\nbatch_size: 3\nseed: 7\n")
    config = preset("qad-prompt", "--config_path", str(file), "--batch-size", "5")
    assert (config.batch_size, config.seed) == (5, 7)
    # Groups are merged: what only one of the two says of the optimiser stays.
    optimizer = config.optimizer
    assert (optimizer.schedule, optimizer.clip_norm) == ("linear", 2.0)
    assert (optimizer.learning_rate, optimizer.warmup) == (1e-2, 0.05)
    assert config.lora.rank == 8


def test_a_file_or_a_recipe_of_an_experiment_may_name_one(tmp_path):
    tree = {"model": "m", "out": "o", "preset": "rilq", "lora": {"rank": 4}}
    tree["teacher"] = {"model": "dense"}
    config = from_dict(Train, tree)
    assert config.lora.rank == 4 and config.lora.alpha == 16 and config.patience == 5
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    assert from_yaml(Train, tmp_path / "x.yaml") == config
    assert parse(Train, ["--config_path", str(tmp_path / "x.yaml")], "train") == config
    # The resolved settings say all of it, without the name.
    assert from_dict(Train, to_dict(config)) == config


def test_a_preset_that_is_none():
    for arguments in (["--preset", "best"], ["--preset=best"]):
        with pytest.raises(ConfigError, match=r"--preset 'best' is not one of paper, xu2023, car"):
            parse(Train, [*NEEDED, *arguments], "train")
    with pytest.raises(ConfigError, match="--preset needs one of paper, "):
        parse(Train, [*NEEDED, "--preset"], "train")
    with pytest.raises(ConfigError, match=r"unknown key 'preset'"):
        from_dict(Compress, {"model": "m", "preset": "paper"})


def test_help_lists_them(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"--preset NAME, one of {', '.join(PRESETS)}" in said
