"""What a training is said to take: counted by hand, from shapes alone, and with its remedy."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax import formats
from idp_jax.cli import main
from idp_jax.config import Data, Lora, Train
from idp_jax.formats.load import storage_of
from idp_jax.formats.source import open_config
from idp_jax.models.abstract import Storage, abstract
from idp_jax.models.config import from_hf
from idp_jax.training.plan import forward, measured_rate, plan
from tests.helpers import tiny_folder

pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.fixture(scope="module")
def config_alone(tmp_path_factory):
    """A folder with a model's config.json and nothing else."""
    whole = tiny_folder(tmp_path_factory.mktemp("whole") / "model", num_layers=2)
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text((whole / "config.json").read_text())
    return folder


def settings(folder, **changes) -> Train:
    data = Data(sequence_length=32, validation_windows=3)
    fields = {"model": str(folder), "out": "unused", "batch_size": 4, "prompt_length": 5}
    return Train(**{**fields, "tokens": 4 * 32 * 10, "evaluate_every": 4, "data": data, **changes})


def test_operations_are_those_of_the_products(config_alone):
    raw = json.loads((config_alone / "config.json").read_text())
    model = from_hf(open_config(config_alone))
    d, f, length = raw["hidden_size"], raw["intermediate_size"], 32
    heads, kv = raw["num_attention_heads"], raw["num_key_value_heads"]
    head = model.head_dim
    layer = 2 * (2 * d * heads * head + 2 * d * kv * head + 3 * d * f)
    products = raw["num_hidden_layers"] * (layer + 2 * heads * head * length)
    expected = length * (products + 2 * d * raw["vocab_size"])
    assert forward(model, length) == expected
    (found,) = plan(settings(config_alone), None)
    assert found.step == 4 * 2 * expected and found.validations == 3 * 3 * expected
    (again,) = plan(settings(config_alone, remat="layer"), None)
    assert again.step == 4 * 3 * expected


@pytest.mark.slow
def test_memory_is_the_models_the_states_and_the_steps(config_alone):
    found = plan(settings(config_alone, method="idp", pool_lengths=(3, 40)), None)
    model = abstract(from_hf(open_config(config_alone)))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))
    for length, part in zip((3, 40), found, strict=True):
        prompt = 4 * length * 64
        # Adapter, best adapter, two moments; steps and losses; the batch.
        assert 4 * prompt <= part.held - weights - 4 * 32 * 4 <= 4 * prompt + 100
        assert part.parameters == length * 64 and part.work > 4 * 32 * 64 * 4
        assert part.steps == 10 and part.label == f"prompt of {length}"
    (large,) = plan(settings(config_alone, batch_size=16, tokens=9999), None)
    (small,) = plan(settings(config_alone), None)
    assert large.work > 2 * small.work


def test_what_does_not_fit_is_said_with_the_remedy(config_alone):
    config = settings(config_alone, method="lora", lora=Lora(rank=2))
    (found,) = plan(config, None)
    fits = dataclasses.replace(found, room=found.bytes)
    assert fits.warning(config) is None
    assert dataclasses.replace(found, room=None).warning(config) is None
    tight = dataclasses.replace(found, held=4 * 10**9, work=2 * 10**9, room=5 * 10**9)
    said = "warning: lora needs 6.00 GB, this machine has 5.00 GB: give --remat layer or more --pas"
    assert str(tight.warning(config)).startswith(said)
    one = dataclasses.replace(config, batch_size=1, remat="layer")
    assert str(tight.warning(one)).endswith("GB: give --data.sequence-length below 32")
    assert tight.line(1e9).startswith("lora: 6.00 GB of 5.00 GB of memory (4.00 GB held, 2.00 GB")


def test_the_plan_is_printed_and_nothing_is_loaded(config_alone, monkeypatch, capsys, tmp_path):
    refuse = lambda *args, **options: pytest.fail("loaded")
    monkeypatch.setattr(formats, "load_model", refuse)
    monkeypatch.setattr(formats, "load_tokenizer", refuse)
    out = tmp_path / "run"
    sizes = ["--data.sequence-length", "32", "--tokens", "1280", "--method", "idp"]
    main(["train", "--model", str(config_alone), "--out", str(out), "--plan", *sizes])
    said = " ".join(capsys.readouterr().err.split())
    for word in ("prompt of 25", "prompt of 100", "GB in all", "G operations/s", "6,400"):
        assert word in said
    assert not out.exists()


def test_a_rate_is_a_number(config_alone):
    model = from_hf(open_config(config_alone))
    assert 0 < measured_rate(model, jnp.float32, 128) < np.inf


def test_packed_matrices_are_counted_as_they_are_kept(config_alone):
    raw = open_config(config_alone)
    raw.quantization_config = {"quant_method": "gptq", "bits": 3, "group_size": 32}
    assert set(storage_of(raw, keeps=False).values()) == {Storage()}
    assert set(storage_of(raw, keeps=True).values()) == {Storage(3, 32)}
    packing = {"num_bits": 4, "group_size": 64, "strategy": "group", "type": "int"}
    raw.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": packing}},
        "ignore": ["lm_head", "model.layers.0.mlp.up_proj"],
    }
    kept = storage_of(raw, keeps=True)
    assert kept["down"] == Storage(4, 64) and kept["up"] == Storage()
