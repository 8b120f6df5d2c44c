"""Packed tensors as libraries of all ages wrote them: loaded right, or refused by name."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from idp_jax import load_model, save_model
from idp_jax.formats import compressed_tensors, gptq, hf
from idp_jax.formats.quantization import Packing, write_config
from idp_jax.formats.stack import expanded
from idp_jax.models.decoder import Decoder
from idp_jax.models.names import NAMES
from idp_jax.weights import Quantized
from tests.helpers import (
    close,
    quantize_decoder,
    random_quantized,
    tiny_decoder,
    tiny_ids,
    write_folder,
)

FORMS = ("gptq", "gptq_v2", "pack-quantized")
Q = "model.layers.0.self_attn.q_proj"


def settings(form: str, *, act_order: bool = False, bits: int = 4):
    names = {"q_proj": Packing(bits, 32, False, act_order)}
    return (write_config(form, names) or {}) | {"ignore": []}


def edited(folder, change):
    """The folder, after `change` of its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save(tensors, folder)
    return folder


def save(tensors, folder) -> None:
    """Writes the file; safetensors takes the memory of an array as it lies."""
    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(whole, folder / "model.safetensors")


def refused(folder, *words):
    with pytest.raises(ValueError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def packed_folder(path, form: str, *, bits: int = 4, act_order: bool = False):
    """A model and its folder."""
    model = quantize_decoder(tiny_decoder("llama"), bits, act_order=act_order)
    folder = write_folder(model, path, settings(form, bits=bits, act_order=act_order))
    save(dict(hf.disassemble(model, form=form)), folder)
    return model, folder


def same_logits(folder, model: Decoder) -> bool:
    ids = tiny_ids(model)
    return close(load_model(folder)(ids), model(ids), 1e-4)


def tensors_of(form: str, name: str, weight: Quantized) -> dict[str, np.ndarray]:
    parts = (
        compressed_tensors.from_weight(weight)
        if form == "pack-quantized"
        else gptq.from_weight(name, weight, form)
    )
    return {f"{name}.{part}": value for part, value in parts.items()}


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_head_multiplies_as_what_it_stands_for(tmp_path, form):
    model = quantize_decoder(tiny_decoder("llama", vocab_size=96))
    head = random_quantized(model.config.hidden_dim, 96, 4)
    folder = write_folder(model, tmp_path / "model", settings(form) | {"lm_head": True})

    def pack_head(tensors):
        tensors.clear()
        tensors.update(dict(hf.disassemble(model, form=form)))
        del tensors["lm_head.weight"]
        tensors.update(tensors_of(form, "lm_head", head))

    edited(folder, pack_head)
    model.head = expanded(head)
    assert same_logits(folder, model)
    again = load_model(save_model(load_model(folder), tmp_path / "again", like=folder))
    assert close(again(tiny_ids(model)), model(tiny_ids(model)), 1e-4)


@pytest.mark.parametrize("name", ["project_in", "project_out"])
def test_a_packed_projection_multiplies_as_what_it_stands_for(tmp_path, name):
    model = quantize_decoder(tiny_decoder("opt", embedding_dim=32))
    inputs, outputs = getattr(model, name).kernel.shape
    weight = random_quantized(inputs, outputs, 4)
    folder = write_folder(model, tmp_path / "model", settings("gptq_v2"))
    module = f"model.decoder.{name}"

    def pack_projection(tensors):
        del tensors[f"{module}.weight"]
        tensors.update(tensors_of("gptq_v2", module, weight))

    edited(folder, pack_projection)
    setattr(model, name, expanded(weight))
    assert same_logits(folder, model)


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_embedding_is_refused_by_name(tmp_path, form):
    model, folder = packed_folder(tmp_path / "model", form)

    def pack_embedding(tensors):
        del tensors["model.embed_tokens.weight"]
        weight = random_quantized(model.config.hidden_dim, 96, 4)
        tensors.update(tensors_of(form, "model.embed_tokens", weight))

    refused(edited(folder, pack_embedding), "model.embed_tokens", "packed")


def test_an_index_of_minus_one_is_none(tmp_path):
    model, folder = packed_folder(tmp_path / "model", "pack-quantized", bits=8)

    def mark(tensors):
        for name in [n for n in tensors if n.endswith("weight_packed")]:
            inputs = tensors[name].shape[1] * 4
            index = np.full(inputs, -1, np.int64)
            tensors[name.replace("weight_packed", "weight_g_idx")] = index

    assert same_logits(edited(folder, mark), model)

    def mark_some(tensors):
        tensors[f"{Q}.weight_g_idx"][1:] = 0

    refused(edited(folder, mark_some), f"{Q}.weight_g_idx")


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("dtype", [np.int8, np.int32])
def test_single_zero_points_are_those_of_the_packed_ones(tmp_path, bits, dtype):
    model, folder = packed_folder(tmp_path / "model", "pack-quantized", bits=bits)

    def unpack_zeros(tensors):
        for layer in range(model.config.num_layers):
            for name, module in MODULES.items():
                zeros = np.asarray(getattr(model.layers, name).zeros[layer]).T
                signed = zeros.astype(np.int64) - 2 ** (bits - 1)
                key = f"model.layers.{layer}.{module}.weight_zero_point"
                tensors[key] = np.ascontiguousarray(signed.astype(dtype))

    assert same_logits(edited(folder, unpack_zeros), model)


MODULES = NAMES["llama"].weights


@pytest.mark.parametrize(
    ("form", "part", "change"),
    [
        ("pack-quantized", "weight_zero_point", lambda x: np.full((64, 2), 100, np.int8)),
        ("pack-quantized", "weight_zero_point", lambda x: np.zeros((64, 2), np.uint8)),
        ("pack-quantized", "weight_zero_point", lambda x: np.zeros((2, 64), np.int8)),
        ("pack-quantized", "weight_zero_point", lambda x: x.astype(np.int64)),
        ("pack-quantized", "weight_packed", lambda x: x.view(np.float32)),
        ("pack-quantized", "weight_shape", lambda x: x + 32),
        ("pack-quantized", "weight_scale", lambda x: np.ascontiguousarray(x.T)),
        ("pack-quantized", "weight_scale", lambda x: x.astype(np.int32)),
        ("gptq", "qweight", lambda x: x.view(np.float32)),
        ("gptq", "qzeros", lambda x: x.astype(np.int64)),
        ("gptq_v2", "scales", lambda x: x.astype(np.int16)),
        ("gptq_v2", "g_idx", lambda x: np.full_like(x, -1)),
        ("gptq_v2", "g_idx", lambda x: x.astype(np.float32)),
    ],
)
def test_a_tensor_of_another_kind_is_refused_by_name(tmp_path, form, part, change):
    _, folder = packed_folder(tmp_path / "model", form)

    def replace(tensors):
        tensors[f"{Q}.{part}"] = change(tensors[f"{Q}.{part}"])

    refused(edited(folder, replace), f"{Q}.{part}")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("form", "part"),
    [("gptq", "scales"), ("gptq_v2", "scales"), ("pack-quantized", "weight_scale")],
)
def test_scales_that_are_not_finite_are_counted(tmp_path, form, part, value):
    _, folder = packed_folder(tmp_path / "model", form)
    name = f"model.layers.1.mlp.down_proj.{part}"

    def spoil(tensors):
        tensors[name][:2, 1] = value

    refused(edited(folder, spoil), name, "2 of 192 numbers")


class TestGptqIndex:
    """`g_idx` of GPTQ files: absent, plain, or an order that desc_act announces."""

    def test_absent_or_plain_groups_are_runs(self, tmp_path):
        model, folder = packed_folder(tmp_path / "model", "gptq")
        assert same_logits(folder, model)

        def drop(tensors):
            for name in [name for name in tensors if name.endswith("g_idx")]:
                del tensors[name]

        assert same_logits(edited(folder, drop), model)

    def test_an_announced_order_must_be_there(self, tmp_path):
        model, folder = packed_folder(tmp_path / "model", "gptq_v2", act_order=True)
        assert same_logits(folder, model)
        refused(edited(folder, lambda tensors: tensors.pop(f"{Q}.g_idx")), f"{Q}.g_idx", "desc_act")

    def test_groups_finer_than_the_settings_are_refused(self, tmp_path):
        _, folder = packed_folder(tmp_path / "model", "gptq")
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["group_size"] = 64
        (folder / "config.json").write_text(json.dumps(config))
        refused(
            edited(folder, lambda tensors: tensors.pop(f"{Q}.g_idx")), f"{Q}.g_idx", "group_size 64"
        )
