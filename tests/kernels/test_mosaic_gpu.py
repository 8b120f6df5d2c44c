"""The GPU kernel for packed weights, on the CPU.

Its walk over the matrix is interpreted. Every thread's registers, made by the kernel's own
arithmetic from the words that the thread reads, are compared at the places that Mosaic's
description of a tensor core operand names. What Mosaic makes of that arithmetic needs a GPU:
kernels/bench/check_gpu.py runs it there.
"""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.kernels import gpu_blocks, tuned
from idp_jax.kernels.codes import TILE, pack_tiles, to_fragments
from idp_jax.kernels.packing import BIT_WIDTHS
from idp_jax.kernels.quant_matmul import mosaic_gpu, reference, sizes
from idp_jax.kernels.quant_matmul.layout import repack
from tests.kernels.problems import (
    check_interpreted,
    checkpoint,
    groups_of,
    halves_of_registers,
    places_in_registers,
)


def _weight(bits, inputs, outputs, group_size):
    packed = checkpoint(bits, inputs, outputs, groups_of(inputs, group_size))
    return repack(*packed, bits=bits, arrangement="fragments")


@pytest.mark.parametrize(
    "bits, inputs, outputs, group_size, rows, dtype",
    [
        (4, 512, 128, 128, 1, "bfloat16"),
        (3, 1536, 72, -1, 5, "bfloat16"),
        (2, 320, 64, 64, 3, "float32"),
        (8, 288, 64, 32, 70, "bfloat16"),
    ],
)
def test_interpreted(bits, inputs, outputs, group_size, rows, dtype):
    weight = _weight(bits, inputs, outputs, group_size)
    exact = (reference.quant_matmul, reference.gradient)
    check_interpreted(mosaic_gpu.quant_matmul, *exact, weight, rows, dtype)


def test_registers_are_those_of_a_tensor_core_operand():
    words = np.random.default_rng(0).integers(0, 2**14, (3, 2, 256)).astype(np.int32)
    sets = list(jnp.asarray(words * 2**16 + words[::-1]))
    operand = gpu_blocks.operand(sets, interpreted=True)
    found = halves_of_registers(sets)[places_in_registers(48)]
    np.testing.assert_array_equal(found, np.asarray(operand, np.float32))
    for before, after in zip(sets, gpu_blocks.words_of(operand, interpreted=True), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_every_register_holds_its_two_codes(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (TILE, 64))
    words = to_fragments(pack_tiles(jnp.asarray(codes), bits)).reshape(bits, 2, 256)
    sets = gpu_blocks.code_words(list(words), bits)
    found = halves_of_registers(sets)[places_in_registers(TILE)]
    np.testing.assert_array_equal(found, codes.T + (0 if bits == 8 else 2**bits))


def test_what_it_cannot_serve_is_named():
    weight = _weight(4, 64, 64, -1)
    rows = repack(*checkpoint(4, 64, 64, 1), bits=4)
    x = jnp.ones((1, 64), jnp.bfloat16)
    assert mosaic_gpu.unsupported(x, weight) is None
    assert "arranged as rows: prepare it for mosaic_gpu" in str(mosaic_gpu.unsupported(x, rows))
    assert "x is float16" in str(mosaic_gpu.unsupported(x.astype(jnp.float16), weight))
    assert "no multiples of 8" in str(mosaic_gpu.unsupported(x, _weight(4, 64, 60, -1)))
    with pytest.raises(ValueError, match="group size 96"):
        mosaic_gpu.quant_matmul(jnp.ones((1, 192), jnp.bfloat16), _weight(4, 192, 64, 96))


def test_sizes_fill_the_machine_and_fit():
    of = functools.partial(gpu_blocks.sizes, "unknown")
    assert of(3, 4096, 4096, 1) == (8, 4, 8)
    assert of(3, 4096, 11008, 1).shares == 1
    assert of(4, 512, 4096, 1).shares == 1
    for bits, rows in itertools.product((2, 3, 4, 8), (8, 64, 200)):
        block_rows, _, stages = of(bits, 4096, 4096, rows)
        assert 2 <= stages <= 8
        assert stages * (512 * block_rows + 2048 * bits + 2048) <= 110 * 2**10
    assert of(3.0, 4096, 4096, 1, 512) == (8, 4, 4)


def test_the_table_comes_first(monkeypatch):
    name = tuned.key("gpu", 3, 4096, 4096, 1)
    monkeypatch.setitem(tuned.table(), "some GPU", {name: [16, 2, 3]})
    assert gpu_blocks.sizes("some GPU", 3, 4096, 4096, 1) == (16, 2, 3)
    name = tuned.key("prefill", 3, 4096, 4096, 512)
    monkeypatch.setitem(tuned.table(), "some TPU", {name: [128, 256, 512]})
    assert sizes.prefill_blocks("some TPU", 3, 4096, 4096, 512, 2) == (128, 256, 512)
