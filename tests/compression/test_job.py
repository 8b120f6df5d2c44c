"""A compression job: its folder, and what is left of it when it is stopped anywhere."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from idp_jax import load_model
from idp_jax.compression import job as job_module
from idp_jax.compression.driver import CompressionError
from idp_jax.compression.driver import compress as compress_in_memory
from idp_jax.compression.job import Job, calibration_tokens, compress
from idp_jax.config import Compress, ConfigError
from idp_jax.formats.quantization import read_config
from idp_jax.jobs.marker import MARKER
from idp_jax.models.block import layer_slice
from idp_jax.weights import Dense, Quantized

FILES = {
    ".idp-jax.json",
    "compression.json",
    "compression.png",
    "config.json",
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def settings_of(files: Path, out: Path, **other) -> Compress:
    """A small job; the defaults of the method but for its sizes."""
    small = {"group_size": 32, "samples": 4, "sequence_length": 32, "batch_size": 2}
    text = str(files / "text.txt")
    return Compress(
        **{"model": str(files / "model"), "calibration": text, **small, **other}, out=out
    )


@functools.cache
def finished(files: Path, folder: Path, **other) -> Path:
    """The folder of a job that ran in one go."""
    settings = settings_of(files, folder / "whole", **other)
    compress(settings)
    return settings.out


def content(folder: Path) -> dict[str, bytes | dict]:
    """Every file, less what depends on the run: the picture, the times, the folder's name."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("compression.png", MARKER):  # the marker lists the digests of the others
        found.pop(name, None)
    report = json.loads(found["compression.json"])
    for key in ("seconds", "peak_memory"):
        assert report.pop(key)
    del report["config"]["out"], report["config"]["allow_worse"]
    return {**found, "compression.json": report}


def test_the_folder_is_what_memory_gives(files, tmp_path):
    settings = settings_of(
        files, tmp_path / "out", rules=("layers.0.*up_proj method=rtn bits=4", "k_proj skip")
    )
    report = compress(settings)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in settings.out.iterdir()} == FILES | {"quantize_config.json"}
    model = load_model(files / "model")
    expected, rows = compress_in_memory(
        model, settings, calibration_tokens(settings), batch_size=settings.batch_size
    )
    assert report["matrices"] == rows
    assert set(report) == {"config", "environment", "matrices", "seconds", "peak_memory"}
    assert json.loads((settings.out / "compression.json").read_text()) == report
    loaded = load_model(settings.out)
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True)
    for here, there in pairs:
        np.testing.assert_array_equal(here, there)
    config = json.loads((settings.out / "config.json").read_text())["quantization_config"]
    assert config == json.loads((settings.out / "quantize_config.json").read_text())
    layout = read_config(config)
    assert layout.form == "gptq_v2" and config["damp_percent"] == 0.01
    assert layout.packing("model.layers.0.mlp.up_proj").bits == 4
    assert layout.packing("model.layers.1.mlp.up_proj").bits == 3
    assert layout.packing("model.layers.1.self_attn.k_proj") is None
    index = json.loads((settings.out / "model.safetensors.index.json").read_text())
    sizes = [path.stat().st_size for path in settings.out.glob("*.safetensors")]
    assert index["metadata"]["total_size"] == sum(sizes)


FORMS = {
    "gptq": {"method": "rtn", "bits": 4, "format": "gptq"},
    "gptq_v2": {"method": "rtn", "bits": 3, "format": "gptq_v2"},
    "pack-quantized": {"method": "rtn", "bits": 4, "format": "pack-quantized", "symmetric": True},
    "dense": {"method": "magnitude", "sparsity": "0.5"},
    "sparse-bitmask": {"method": "magnitude", "format": "sparse-bitmask"},
    "sparse-24-bitmask": {"method": "magnitude", "sparsity": "2:4", "format": "sparse-24-bitmask"},
}


@pytest.mark.parametrize(("form", "other"), FORMS.items(), ids=FORMS)
def test_forms(files, tmp_path, form, other):
    """Methods that need no text: the text that is named does not exist."""
    settings = settings_of(files, tmp_path / "out", calibration="none.txt", **other)
    assert settings.form == form
    compress(settings)
    assert not (settings.out / "compression.png").exists()
    expected, _ = compress_in_memory(load_model(files / "model"), settings)
    loaded = load_model(settings.out)
    packed = isinstance(loaded.layers.q, Quantized)
    assert packed == (other["method"] == "rtn")
    for name in loaded.layers.weight_names:
        weights = (getattr(model.layers, name).dense() for model in (loaded, expected))
        np.testing.assert_array_equal(*weights)
    config = json.loads((settings.out / "config.json").read_text()).get("quantization_config")
    assert (config is None) == (form == "dense")
    if config is not None:
        assert read_config(config).form == form
    names = {n for path in settings.out.glob("*.safetensors") for n in load_file(path)}
    own = {"gptq": "qweight", "pack": "weight_packed", "sparse": "bitmask", "dense": "weight"}
    assert f"model.layers.0.mlp.up_proj.{own[form[:6].rstrip('_-v').split('-')[0]]}" in names


@pytest.mark.parametrize(
    "other", [{"method": "rtn"}, {"method": "magnitude"}], ids=["rtn", "zeros"]
)
def test_what_is_not_packed_keeps_its_dtype(files, tmp_path, other):
    settings = settings_of(files, tmp_path / "out", model=str(files / "half"), **other)
    compress(settings)
    assert json.loads((settings.out / "config.json").read_text())["dtype"] == "bfloat16"
    dtypes = {}
    for path in settings.out.glob("*.safetensors"):
        dtypes |= {name: tensor.dtype.name for name, tensor in load_file(path).items()}
    packing = ("qweight", "qzeros", "g_idx", "scales")
    plain = {name: dtype for name, dtype in dtypes.items() if not name.endswith(packing)}
    assert set(plain.values()) == {"bfloat16"}
    assert "model.norm.weight" in plain and "lm_head.weight" in plain
    assert len(plain) == (3 if other["method"] == "rtn" else 10) + (
        2 * 2 if other["method"] == "rtn" else 2 * 9 - 7
    )


class Stopped(BaseException):
    """The process was killed here."""


def stop_at(monkeypatch, place: str, call: int) -> None:
    """Stops the job just before the n-th call (from 0) of one of its steps."""
    owner, _, name = place.rpartition(".")
    holder = Job if owner == "Job" else Path if owner == "Path" else job_module
    own, calls = getattr(holder, name), iter(range(100))

    def step(*arguments, **named):
        if next(calls) == call:
            raise Stopped
        return own(*arguments, **named)

    monkeypatch.setattr(holder, name, step)


# A block's report is written before its tensors: calls of write_text 0 and 1, of _save 0 and 1.
STOPS = {
    "before the first block": ("Job._write", 0),
    "between a report and its block": ("_save", 0),
    "before the second block": ("Job._write", 1),
    "within the second block's file": ("_save", 1),
    "after the last block": ("Job.finish", 0),
    "before the index": ("Job._write_index", 0),
    "before the settings": ("write_settings", 0),
    "before the report": ("write_json", 0),
    "while drawing": ("draw", 0),
    "before the last rename": ("Path.rename", 0),
}


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> dict[str, bytes | dict]:
    """What a job that was never stopped leaves."""
    return content(finished(files, tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize(("place", "call"), STOPS.values(), ids=STOPS)
def test_a_job_that_was_stopped_goes_on(files, whole, tmp_path, monkeypatch, place, call):
    settings = settings_of(files, tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_at(patch, place, call)
        with pytest.raises(Stopped):
            compress(settings)
    assert not settings.out.exists() and (tmp_path / "out.partial" / "model").is_dir()
    # What may end worse is the one thing that may change on the way.
    compress(replace(settings, allow_worse=("down",)))
    assert content(settings.out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        {"method": "wanda", "sparsity": "2:4", "format": "sparse-24-bitmask"},
        {
            "method": "rtn",
            "rules": ("down_proj method=gptq sparsity=2:4", "k_proj skip"),
            "format": "pack-quantized",
        },
    ],
    ids=["wanda", "mixed"],
)
def test_other_jobs_go_on_too(files, tmp_path, monkeypatch, other):
    """From bfloat16, whose matrices the calibration pass widens."""
    other |= {"model": str(files / "half"), "allow_worse": (".",)}
    (tmp_path / "a").mkdir()
    expected = content(finished(files, tmp_path / "a", **other))
    settings = settings_of(files, tmp_path / "b", **other)
    with monkeypatch.context() as patch:
        stop_at(patch, "Job._write", 1)
        with pytest.raises(Stopped):
            compress(settings)
    compress(settings)
    assert content(settings.out) == expected


def test_a_matrix_that_is_worse_can_be_allowed_later(files, tmp_path, monkeypatch, whole):
    from idp_jax.compression import driver

    settings, own = settings_of(files, tmp_path / "out"), driver._numbers

    def numbers(row):
        found = own(row)
        return found | {"baseline_error": found["relative_error"] / 2} if len(seen) == 9 else found

    seen = []
    monkeypatch.setattr(driver, "_numbers", lambda row: (numbers(row), seen.append(0))[0])
    with pytest.raises(CompressionError, match="--allow-worse 'model.layers.1.self_attn.v_proj'"):
        compress(settings)
    monkeypatch.undo()
    compress(replace(settings, allow_worse=(r"layers.1.self_attn.v_proj",)))
    assert content(settings.out) == whole


@pytest.fixture
def stopped(files, tmp_path, monkeypatch) -> Compress:
    """A job that was stopped before its second block, on a model of its own."""
    (tmp_path / "model").mkdir()
    for path in (files / "model").iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    settings = settings_of(files, tmp_path / "out", model=str(tmp_path / "model"), method="rtn")
    with monkeypatch.context() as patch:
        stop_at(patch, "Job._write", 1)
        with pytest.raises(Stopped):
            compress(settings)
    return settings


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"bits": 4}, "out.partial holds a run with bits = 3, this one has 4; give another --out"),
        ({"seed": 1}, "out.partial holds a run with seed = 0"),
        ({"rules": ("up skip",)}, r"out.partial holds a run with rules = \[\]"),
        ({"format": "gptq"}, "out.partial holds a run with format = 'auto'"),
    ],
)
def test_another_job_in_the_same_folder(stopped, other, message):
    with pytest.raises(ConfigError, match=message) as error:
        compress(replace(stopped, **other))
    assert "\n" not in str(error.value)


def test_another_model_under_the_same_name(stopped):
    file = Path(stopped.model) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"another model: model\.safetensors has changed"):
        compress(stopped)


def test_a_result_is_not_replaced_unasked(files, tmp_path, monkeypatch):
    settings = settings_of(files, tmp_path / "out", method="rtn")
    compress(settings)
    before = content(settings.out)
    with pytest.raises(ValueError, match="out exists; give another folder, or --overwrite"):
        compress(settings)
    again = replace(settings, bits=4, overwrite=True)
    for place, call in (("Job._write", 1), ("Job.finish", 0)):
        with monkeypatch.context() as patch:
            stop_at(patch, place, call)
            with pytest.raises(Stopped):
                compress(again)
        assert content(settings.out) == before
    compress(again)
    assert load_model(settings.out).layers.q.bits == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_kill_after_the_last_rename_leaves(files, tmp_path, monkeypatch):
    settings = settings_of(files, tmp_path / "out", method="rtn")
    with monkeypatch.context() as patch:
        patch.setattr(Job, "_discard", lambda job: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            compress(settings)
    before = content(settings.out)
    assert (tmp_path / "out.partial").is_dir()
    with pytest.raises(ValueError, match="out exists"):
        compress(settings)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert content(settings.out) == before


def test_a_folder_of_somebody_else_stays(files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "letter.txt").write_text("dear")
    settings = settings_of(files, tmp_path / "out", method="rtn", overwrite=True)
    with pytest.raises(ConfigError, match="out.partial exists and holds no run of this kind"):
        compress(settings)
    assert (tmp_path / "out.partial" / "letter.txt").read_text() == "dear"


def test_a_packed_model_is_refused(files, tmp_path):
    settings = settings_of(files, tmp_path / "out", method="rtn")
    compress(settings)
    again = replace(settings, model=str(settings.out), out=tmp_path / "again")
    with pytest.raises(ConfigError, match="out is packed already; compress the original model"):
        compress(again)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("form", ["auto", "dense", "sparse-bitmask", "sparse-24-bitmask"])
def test_fewer_bits_in_a_form_without_them(files, tmp_path, form):
    """Refused before any work, by the plan too; the remedy that is named works."""
    rules = ("layers.1.*up_proj method=rtn sparsity=0.0",)
    settings = settings_of(files, tmp_path / "out", method="magnitude", format=form, rules=rules)
    own = "dense" if form == "auto" else form
    said = f"layers.1.mlp.up_proj gets fewer bits .rtn., which --format {own} cannot store"
    for wanted in (settings, replace(settings, plan=True)):
        with pytest.raises(ConfigError, match=said) as error:
            compress(wanted)
        assert "--method rtn" in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_zeros_alone_stay_dense_among_packed_matrices(files, tmp_path):
    rules = ("layers.1.*up_proj", ". method=magnitude sparsity=0.5")
    settings = settings_of(
        files,
        tmp_path / "out",
        model=str(files / "half"),
        method="rtn",
        rules=(f"{rules[0]} bits=4", rules[1]),
    )
    compress(settings)
    tensors = {}
    for file in settings.out.glob("*.safetensors"):
        tensors |= load_file(file)
    packed = {name.rpartition(".")[0] for name in tensors if name.endswith(".qweight")}
    assert packed == {"model.layers.1.mlp.up_proj"}
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == jnp.bfloat16


def test_out_is_asked_for(files):
    with pytest.raises(ConfigError, match="--out is missing: give the folder"):
        compress(settings_of(files, None))


def test_zeros_without_any_error(files, tmp_path):
    """A layer whose output does not change at all can be drawn, too."""
    settings = settings_of(files, tmp_path / "out", method="wanda", sparsity="0.0")
    compress(settings)
    kept = load_model(settings.out).layers
    for name in kept.weight_names:
        weight = layer_slice(kept, 0)
        assert isinstance(getattr(weight, name), Dense)
    np.testing.assert_array_equal(kept.q.dense(), load_model(files / "model").layers.q.dense())
