"""Layers that are stored each in its own way become one stack of the same numbers."""

import numpy as np
import pytest

from idp_jax import load_model
from idp_jax.formats.hf import block_packings, block_tensors, outer_tensors
from idp_jax.formats.quantization import write_config
from idp_jax.formats.stack import alike
from idp_jax.models.block import layer_slice
from idp_jax.weights import Dense, Quantized
from tests.helpers import quantize_decoder, random_quantized, tiny_decoder, write_folder

RNG = np.random.default_rng(0)


def packed(bits: int, groups: int = 2, **options) -> Quantized:
    return random_quantized(96, 32, bits, 96 // groups, seed=10 * bits + groups, **options)


MIXED = {
    "bits": ([packed(2), packed(8), packed(3)], (8, 2, False)),
    "groups": ([packed(4, 1), packed(4, 3), packed(4, 2)], (4, 6, False)),
    "bits-and-groups": ([packed(3, 3), packed(4, 1)], (4, 3, False)),
    "act-order": ([packed(4, 2, act_order=True), packed(4, 3), packed(8, 1)], (8, 3, True)),
    "alike": ([packed(3), packed(3)], (3, 2, False)),
}


@pytest.mark.parametrize("case", sorted(MIXED))
def test_packed_otherwise(case):
    weights, (bits, groups, indexed) = MIXED[case]
    same = alike(weights)
    for before, after in zip(weights, same, strict=True):
        assert isinstance(after, Quantized) and after.bits == bits
        assert after.scales.shape == after.zeros.shape == (groups, 32)
        assert (after.group_index is not None) == indexed
        np.testing.assert_array_equal(after.dense(), before.dense())


def test_one_dense_layer_makes_all_dense():
    first = packed(3, bias=True)
    bias = np.asarray(first.bias[...])
    weights = [first, Dense(RNG.normal(size=(96, 32)).astype(np.float32), bias)]
    for before, after in zip(weights, alike(weights), strict=True):
        assert isinstance(after, Dense) and after.kernel.dtype == np.float32
        np.testing.assert_array_equal(after.dense(), before.dense())
        np.testing.assert_array_equal(after.bias[...], bias)


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "pack-quantized"])
def test_a_mixed_checkpoint_is_loaded(tmp_path, form):
    """Layer by layer: 3 bits; 8 bits in other groups, `up` left dense; 4 bits, rows, symmetric."""
    dense = tiny_decoder("opt", num_layers=3)
    kinds = [quantize_decoder(dense, 3), quantize_decoder(dense, 8, group_size=-1, seed=1)]
    kinds.append(quantize_decoder(dense, 4, group_size=-1, seed=2))
    blocks = [layer_slice(model.layers, layer) for layer, model in enumerate(kinds)]
    blocks[1] = blocks[1].replace(up=layer_slice(dense.layers, 1).up)
    for name in blocks[2].weight_names:
        zeros = getattr(blocks[2], name).zeros
        zeros[...] = np.full_like(zeros[...], 8)
    tensors, packings = dict(outer_tensors(dense)), {}
    for layer, block in enumerate(blocks):
        packings |= block_packings(dense.config, layer, block)
        tensors |= dict(block_tensors(dense.config, layer, block, form))
    folder = write_folder(dense, tmp_path / "model", write_config(form, packings))
    write_tensors(folder, tensors)
    loaded = load_model(folder)
    assert isinstance(loaded.layers.up, Dense) and loaded.layers.q.bits == 8
    assert loaded.layers.q.zeros.shape[:2] == (3, 2)
    for layer, block in enumerate(blocks):
        for name in block.weight_names:
            ours = layer_slice(getattr(loaded.layers, name), layer)
            np.testing.assert_array_equal(ours.dense(), getattr(block, name).dense())
            np.testing.assert_array_equal(ours.bias[...], getattr(block, name).bias[...])


def write_tensors(folder, tensors) -> None:
    from safetensors.numpy import save_file

    own = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(own, folder / "model.safetensors")
