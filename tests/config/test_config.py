"""Settings: files that load, options that win, and one line for whatever cannot be used."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from idp_jax.cli import COMMANDS, parse
from idp_jax.config import (
    Compress,
    Compression,
    ConfigError,
    Demo,
    Evaluate,
    Lora,
    Optimizer,
    PoolStudy,
    Reproduce,
    Sweep,
    Train,
)
from idp_jax.config.files import from_dict, from_yaml, to_dict

ROOT = Path(__file__).parents[2]
KINDS = {"pods": Train, "compress": Compress, "train": Train, "configs": Demo, "eval": Evaluate}
KINDS |= {"sweep": Sweep, "reproduce": Reproduce}
PRESETS = ROOT / "configs" / "presets"  # settings of a recipe alone, see test_presets.py
FILES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent != PRESETS
)
TRAIN = {"model": "m", "out": "o"}
EVALUATE = {"model": "m", "out": "o", "tasks": "sciq"}


def test_there_are_configurations():
    assert {"configs/demo.yaml", "configs/demo-quick.yaml"} <= set(FILES)
    assert {Path(file).parent.name for file in FILES} >= {"compress", "train"}


@pytest.mark.parametrize("file", FILES)
def test_a_file_loads_and_says_how(file, monkeypatch):
    """The command in its first line is parsed as a shell would run it from the checkout."""
    monkeypatch.chdir(ROOT)
    kind = KINDS[Path(file).parent.name]
    first = Path(file).read_text().splitlines()[0]
    assert first.startswith("# ") and f"--config_path {file}" in first
    words = shlex.split(re.split(r"\s{2,}", first.removeprefix("# "))[0])
    if words[0] == "python":
        command, rest = words[1].removesuffix(".py"), words[2:]
    else:
        assert words[0] == "idp-jax"
        command, rest = words[1], words[2:]
    assert COMMANDS[command] is kind
    assert parse(kind, rest, command) == from_yaml(kind, file)


@pytest.mark.parametrize("kind", [Compress, Train, Evaluate, Demo, PoolStudy])
def test_settings_survive_a_file(tmp_path, kind):
    """config.yaml, which stands beside every output, gives the same settings again."""
    extra = {"tasks": "sciq"} if kind in (Evaluate, PoolStudy) else {}
    extra |= {"adapter": "a"} if kind is PoolStudy else {}
    config = from_dict(kind, {"model": "m", "out": "o", "seed": 3, **extra})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert from_yaml(kind, tmp_path / "config.yaml") == config


BAD = {
    "unknown": (Compress, {"bitz": 3}, "unknown key 'bitz'"),
    "unknown-inside": (Train, {"lora": {"rang": 3}}, "unknown key 'lora.rang'"),
    "unknown-mesh": (Train, {"mesh": {"tensor": 2}}, "unknown key 'mesh.tensor'"),
    "unknown-demo": (Demo, {"compression": {"bit": 2}}, "unknown key 'compression.bit'"),
    "not-a-number": (Compress, {"samples": "three"}, r"samples: .*integer .*'three'"),
    "no-choice": (Compress, {"bits": "three"}, "--bits 'three' is not one of 2, 3, 4, 8"),
    "no-choice-inside": (Demo, {"compression": {"grid": 1}}, "--compression.grid 1 is not one of"),
    "not-a-whole-number": (Train, {"tokens": 1e3 + 0.5}, r"tokens: .*integer.*1000\.5"),
    "not-a-section": (Train, {"data": "c4"}, r"data: .*'c4'"),
    "not-a-list": (Train, {"pool_lengths": 5}, r"pool_lengths: .*5"),
    "no-model": (Train, {"model": None}, r"model: .*None"),
    "bits": (Compress, {"bits": 5}, "--bits 5 is not one of 2, 3, 4, 8"),
    "method": (Compress, {"method": "awq"}, "--method 'awq' is not one of gptq, rtn"),
    "group": (Compress, {"group_size": 0}, "--group-size 0 must be at least 1"),
    "block": (Compress, {"block_size": 0}, "--block-size 0 must be at least 1"),
    "damping": (Compress, {"damping": -0.1}, r"--damping -0\.1 must be at least 0"),
    "sparsity": (
        Compress,
        {"method": "magnitude", "sparsity": "half"},
        r"--sparsity 'half' .* such as 0\.5 nor n:m",
    ),
    "all-zeros": (Compress, {"method": "sparsegpt", "sparsity": "1.0"}, r"--sparsity '1\.0'"),
    "pattern": (Compress, {"method": "sparsegpt", "sparsity": "4:4"}, "--sparsity '4:4'"),
    "samples": (Compress, {"samples": 0}, "--samples 0 must be at least 1"),
    "order": (Compress, {"order": "last"}, "--order 'last' is not one of first, random"),
    "dtype": (Compress, {"dtype": "int8"}, "--dtype 'int8' is not one of float32"),
    "repair": (Train, {"method": "soft"}, "--method 'soft' is not one of prompt, prefix"),
    "tokens": (Train, {"tokens": 100}, "--tokens 100 is less than one step of 2048 tokens"),
    "batch": (Train, {"batch_size": 0}, "--batch-size 0 must be at least 1"),
    "length": (Train, {"prompt_length": 0}, "--prompt-length 0 must be at least 1"),
    "pool": (Train, {"pool_lengths": [5, 0]}, r"--pool-lengths \(5, 0\) must name"),
    "empty-pool": (Train, {"pool_lengths": []}, r"--pool-lengths \(\) must name"),
    "rate": (
        Train,
        {"optimizer": {"learning_rate": 0}},
        r"--optimizer\.learning-rate 0.* must be above 0",
    ),
    "warmup": (Train, {"optimizer": {"warmup": 2}}, r"--optimizer\.warmup 2.* between 0 and 1"),
    "clip": (Train, {"optimizer": {"clip_norm": 0}}, r"--optimizer\.clip-norm 0.* above 0"),
    "windows": (
        Train,
        {"data": {"validation_windows": 0}},
        r"--data\.validation-windows 0 must be at least 1",
    ),
    "rank": (Train, {"method": "lora", "lora": {"rank": 0}}, r"--lora\.rank 0 must be at least 1"),
    "two-texts": (
        Train,
        {"init": {"tokens": "text", "text": "a", "file": "b.txt"}},
        r"--init\.text and --init\.file are both given",
    ),
    "text-of-no-use": (
        Train,
        {"init": {"text": "a"}},
        r"--init\.text is given, but --init\.tokens vocabulary takes none",
    ),
    "frozen": (
        Train,
        {"init": {"frozen_tokens": -1}},
        r"--init\.frozen-tokens -1 must be at least",
    ),
    "all-frozen": (
        Train,
        {"prompt_length": 3, "init": {"frozen_tokens": 3}},
        r"--init\.frozen-tokens 3 leaves nothing of 3 tokens to train; .*--tokens 0",
    ),
    "all-frozen-in-a-pool": (
        Train,
        {"method": "idp", "pool_lengths": [9, 2], "init": {"frozen_tokens": 2}},
        r"--init\.frozen-tokens 2 leaves nothing of 2 tokens",
    ),
    "more-than-all-frozen": (
        Train,
        {"prompt_length": 3, "tokens": 0, "init": {"frozen_tokens": 4}},
        r"--init\.frozen-tokens 4 leaves nothing of 3 tokens",
    ),
    "keys-of-a-prompt": (
        Train,
        {"init": {"model": "teacher"}, "teacher": {"model": "t"}},
        r"--init\.model teacher is a start of --method prefix; prompt has no keys",
    ),
    "keys-of-low-rank": (
        Train,
        {"method": "lora", "init": {"model": "teacher"}},
        r"--init\.model teacher is a start of --method prefix; lora has no keys",
    ),
    "no-teacher": (
        Train,
        {"method": "prefix", "init": {"model": "teacher"}},
        r"--init\.model teacher needs --teacher\.model",
    ),
    "prefix-of-a-prompt": (
        Train,
        {"prefix": {"projection": 8}},
        r"--prefix\.\* are settings of --method prefix, not of prompt",
    ),
    "lengths-below-0": (
        Train,
        {"method": "prefix", "prefix": {"lengths": [3, -1]}},
        r"--prefix\.lengths 3 -1 must not be below 0",
    ),
    "lengths-of-0": (
        Train,
        {"method": "prefix", "prefix": {"lengths": [0, 0]}},
        r"--prefix\.lengths 0 0 must not be .* 0 in every layer",
    ),
    "lengths-twice": (
        Train,
        {"method": "prefix", "prefix": {"lengths": [3, 1], "by_damage": True}},
        r"--prefix\.lengths and --prefix\.by-damage are both given",
    ),
    "projection": (
        Train,
        {"method": "prefix", "prefix": {"projection": 0}},
        r"--prefix\.projection 0 must be at least 1",
    ),
    "nothing": (Evaluate, {"tasks": " , "}, "nothing to evaluate: give --tasks"),
    "limit": (Evaluate, {"limit": 0}, "--limit 0 must be a whole number of items, or a fraction"),
    "weights": (Evaluate, {"weights": "int4"}, "--weights 'int4' is not one of auto"),
}


@pytest.mark.parametrize(("kind", "tree", "message"), BAD.values(), ids=BAD)
def test_settings_that_cannot_be_used(tmp_path, kind, tree, message):
    tree = {**(EVALUATE if kind is Evaluate else TRAIN), **tree}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=message) as error:
        from_yaml(kind, tmp_path / "x.yaml")
    assert "\n" not in str(error.value) and "x.yaml: " in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "is not YAML"),
        ("- 1\n- 2\n", "no settings"),
        ("just text", "no settings"),
        ("model: a\nout: b\nmodel: c\n", r"x\.yaml:3: 'model' is there twice; keep one"),
        ("data:\n  train: a\n  train: b\n", r"x\.yaml:3: 'train' is there twice"),
        ("pool_lengths: [{a: 1, a: 2}]\n", r"x\.yaml:1: 'a' is there twice"),
        (None, r"--config_path .*x\.yaml cannot be read: No such file"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        from_yaml(Train, tmp_path / "x.yaml")
    assert "\n" not in str(error.value)


def test_required_settings_are_asked_for(tmp_path):
    (tmp_path / "x.yaml").write_text("model: m\n")
    with pytest.raises(ConfigError, match=r"out: .*required"):
        from_yaml(Train, tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match=r"out.*--help") as error:
        parse(Train, ["--config_path", str(tmp_path / "x.yaml")], "idp-jax train")
    assert "\n" not in str(error.value)
    config = parse(Train, ["--config_path", str(tmp_path / "x.yaml"), "--out", "o"], "train")
    assert (config.model, config.out) == ("m", Path("o"))


def test_options_win_over_the_file(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("model: m\nout: o\nlora: {rank: 4}\noptimizer: {warmup: 0.2}\nseed: 5\n")
    options = ["--lora.rank", "2", "--optimizer.learning-rate", "0.5", "--pool-lengths", "3", "9"]
    config = parse(Train, [f"--config_path={file}", *options], "train")
    assert config.lora.rank == 2 and config.lora.targets == ("q", "v")
    assert config.optimizer.learning_rate == 0.5 and config.optimizer.warmup == 0.2
    assert config.pool_lengths == (3, 9) and config.seed == 5
    assert config == parse(Train, [*options, "--config-path", str(file)], "train")
    # An option mends what the file has wrong, and what it makes of the file is checked.
    file.write_text("model: m\nout: o\ntokens: 10\n")
    with pytest.raises(ConfigError, match="--tokens 10 is less than"):
        parse(Train, [f"--config_path={file}"], "train")
    assert parse(Train, [f"--config_path={file}", "--tokens", "9999"], "train").tokens == 9999
    file.write_text("model: m\nout: o\n")
    with pytest.raises(ConfigError, match=r"--optimizer\.warmup 3.* between 0 and 1"):
        parse(Train, [f"--config_path={file}", "--optimizer.warmup", "3"], "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "2"], "--rank.*--help"),
        (["--seed", "x"], "seed.*x.*--help"),
        (["--lora.rank"], r"lora\.rank.*--help"),
        (["--config_path"], "--config_path needs a YAML file"),
        (["--method", "soft"], "^--method soft is not one of prompt, prefix, lora, norms, idp$"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse(Train, ["--model", "m", "--out", "o", *options], "idp-jax train")
    assert "\n" not in str(error.value)


def test_a_model_may_stand_alone():
    assert parse(Compress, ["some/model", "--out", "o"], "compress").model == "some/model"


def test_steps_and_rates():
    config = Train(model="m", out=Path("o"))
    assert config.steps == 20_000 and config.learning_rate == 1e-3
    assert Train(model="m", out=Path("o"), method="lora").learning_rate == 1e-4
    assert Train(model="m", out=Path("o"), tokens=5000).steps == 2


def test_targets():
    pruned = lambda text: Compression(method="sparsegpt", sparsity=text).target()
    assert pruned("0.5") == {"sparsity": 0.5} and pruned("2:4") == {"pattern": (2, 4)}
    assert pruned("4:8") == {"pattern": (4, 8)} and pruned("0") == {"sparsity": 0.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optimizer(learning_rate=float("nan")), "learning-rate nan is no number"),
        (lambda: Optimizer(learning_rate=float("inf")), "learning-rate inf must be .* finite"),
        (lambda: Optimizer(weight_decay=float("nan")), "weight-decay nan is no number"),
        (lambda: Optimizer(weight_decay=-float("inf")), "weight-decay -inf must be finite"),
        (lambda: Lora(alpha=float("nan")), "alpha nan is no number"),
        (lambda: Train(model="m", out=Path("r"), seed=-1), "seed -1 must lie between 0 and"),
        (lambda: Compress(model="m", seed=2**32), "seed 4294967296 must lie between 0 and"),
    ],
)
def test_numbers_that_no_run_can_use_are_refused_at_once(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
