"""The GPU kernel for 2:4 weights, on the CPU: see test_mosaic_gpu.py.

Registers are compared with the dense matrix, at the places that Mosaic's description of a tensor
core operand names.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.kernels import gpu_blocks
from idp_jax.kernels.packing import BIT_WIDTHS
from idp_jax.kernels.sparse24_matmul import layout, mosaic_gpu, reference
from idp_jax.kernels.sparse24_matmul.api import from_codes, from_dense, sparse24_matmul
from tests.kernels.problems import (
    check_interpreted,
    halves_of_registers,
    places_in_registers,
    sparse_checkpoint,
    sparse_matrix,
)

_check = functools.partial(
    check_interpreted, mosaic_gpu.sparse24_matmul, reference.sparse24_matmul, reference.gradient
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "inputs, outputs, rows, dtype",
    [(512, 128, 1, "bfloat16"), (1200, 64, 5, "bfloat16"), (332, 64, 3, "float32")],
)
def test_interpreted(inputs, outputs, rows, dtype):
    weight = from_dense(sparse_matrix(inputs, outputs), backend="mosaic_gpu")
    _check(weight, rows, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "bits, inputs, outputs, group_size, rows, dtype",
    [
        (2, 1024, 64, 512, 1, "bfloat16"),
        (3, 416, 64, 32, 3, "float32"),
        (4, 552, 128, -1, 5, "bfloat16"),
        (8, 640, 64, 128, 3, "float32"),
    ],
)
def test_interpreted_codes(bits, inputs, outputs, group_size, rows, dtype):
    words, scales, zeros = sparse_checkpoint(bits, inputs, outputs, group_size)
    if group_size > 0:
        scales = scales.at[0].set(0)
    weight = from_codes(words, scales, zeros, bits=bits, backend="mosaic_gpu")
    _check(weight, rows, dtype)


def _weights_in_registers(halves):
    """Words of `expand` for one operand, as weights [64, columns]."""
    return halves_of_registers(halves)[places_in_registers(16 * len(halves))]


def _columns(matrix):
    """What an operand holds of a matrix [I, 64]."""
    order = mosaic_gpu.reordered(jnp.arange(matrix.shape[0], dtype=jnp.float32)[None])[0]
    return np.asarray(matrix, np.float32).T[:, order.astype(int)]


def test_every_register_holds_its_two_weights():
    matrix = sparse_matrix(256, 64)
    weight = from_dense(matrix, backend="mosaic_gpu")
    positions, values = weight.positions.reshape(2, 256), weight.values.reshape(8, 2, 256)
    halves = [h for f in range(8) for h in mosaic_gpu.expand(values[f], positions, f)]
    np.testing.assert_array_equal(_weights_in_registers(halves), _columns(matrix))


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_every_register_holds_its_two_codes_less_zero(bits):
    words, scales, zeros = sparse_checkpoint(bits, 512, 64, -1)
    weight = from_codes(words, jnp.ones_like(scales), zeros, bits=bits, backend="mosaic_gpu")
    positions = weight.positions.reshape(2, 2, 256)
    sets = list(gpu_blocks.code_words(list(weight.values.reshape(bits, 2, 256)), bits))
    offset = jnp.bfloat16(0 if bits == 8 else 2**bits) + zeros[0].astype(jnp.bfloat16)
    kept = gpu_blocks.operand(sets, interpreted=True) - offset[:, None]
    values = gpu_blocks.words_of(kept, interpreted=True)
    halves = [h for f in range(16) for h in mosaic_gpu.expand(values[f], positions[f // 8], f % 8)]
    expected = _columns(layout.to_dense(weight))
    np.testing.assert_array_equal(_weights_in_registers(halves), expected)


@pytest.mark.parametrize("inputs", [8, 256, 300])
def test_round_trip(inputs):
    matrix = sparse_matrix(inputs, 128)
    weight = jax.jit(lambda m: from_dense(m, backend="mosaic_gpu"))(matrix)
    np.testing.assert_array_equal(matrix, jax.jit(layout.to_dense)(weight))
    tiles = -(-inputs // 256)
    assert weight.outputs == 128
    assert weight.values.shape == (2, tiles * 8, 512)
    assert weight.positions.shape == (2, tiles, 512)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("group_size", [-1, 32])
def test_round_trip_of_codes(bits, group_size):
    packed = sparse_checkpoint(bits, 608, 64, group_size)
    compress = functools.partial(from_codes, bits=bits, backend="mosaic_gpu")
    weight = jax.jit(compress)(*packed)
    assert weight.outputs == 64
    assert weight.values.shape == (1, 2 * bits, 512)
    for before, after in zip(packed, jax.jit(layout.to_codes)(weight), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)


def test_xla_multiplies_fragments():
    matrix = sparse_matrix(64, 64)
    x = jnp.ones((2, 64), jnp.bfloat16)
    rows, fragments = (from_dense(matrix, backend=name) for name in ("xla", "mosaic_gpu"))
    np.testing.assert_array_equal(
        sparse24_matmul(x, rows, backend="xla"), sparse24_matmul(x, fragments, backend="xla")
    )


def test_what_it_cannot_serve_is_named():
    weight = from_dense(sparse_matrix(64, 64), backend="mosaic_gpu")
    x = jnp.ones((1, 64), jnp.bfloat16)
    assert mosaic_gpu.unsupported(x, weight) is None
    assert "x is float16" in str(mosaic_gpu.unsupported(x.astype(jnp.float16), weight))
    rows = from_dense(sparse_matrix(64, 64), backend="xla")
    assert "arranged as rows: prepare it for mosaic_gpu" in str(mosaic_gpu.unsupported(x, rows))
    codes = from_codes(*sparse_checkpoint(4, 192, 64, 96), bits=4, backend="mosaic_gpu")
    with pytest.raises(ValueError, match="group size 96 is not 32, 64, 128, 256 or a multiple of"):
        mosaic_gpu.sparse24_matmul(jnp.ones((1, 192), jnp.bfloat16), codes)
    with pytest.raises(ValueError, match="cannot serve: it needs a TPU"):
        sparse24_matmul(x, weight, backend="pallas_tpu")
    with pytest.raises(ValueError, match="cannot serve: the weight is arranged as fragments"):
        sparse24_matmul(x, weight, backend="pallas_tpu", interpret=True)
    with pytest.raises(ValueError, match="5 outputs are no multiple of 64"):
        from_dense(sparse_matrix(8, 5), backend="mosaic_gpu")
    with pytest.raises(ValueError, match="5 outputs are no multiple of 64"):
        from_codes(*sparse_checkpoint(4, 64, 5, -1), bits=4, backend="mosaic_gpu")
    with pytest.raises(ValueError, match="arrangement must be rows or fragments, not columns"):
        layout.from_dense(sparse_matrix(8, 5), arrangement="columns")
