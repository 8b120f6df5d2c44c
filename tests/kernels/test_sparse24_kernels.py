"""Every backend of the product with 2:4 weights against float64, in value and gradient.

The compressed form is compared with the matrix it came from; the TPU kernel runs interpreted.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.kernels.packing import BIT_WIDTHS
from idp_jax.kernels.sparse24_matmul import reference, sizes
from idp_jax.kernels.sparse24_matmul.api import (
    from_codes,
    from_dense,
    sparse24_matmul,
    to_codes,
    to_dense,
)
from tests.kernels.problems import check, sparse_checkpoint, sparse_matrix

_check = functools.partial(check, sparse24_matmul, reference.sparse24_matmul, reference.gradient)


@pytest.mark.parametrize("inputs", [8, 256, 300])
def test_round_trip(inputs):
    matrix = sparse_matrix(inputs, 5)
    weight = jax.jit(from_dense)(matrix)
    assert weight.values.shape == (2, -(-inputs // 256) * 64, 5)
    np.testing.assert_array_equal(matrix, jax.jit(to_dense)(weight))
    dense_bytes = 2 * 2 * weight.values.size
    assert (2 * weight.values.size + 4 * weight.positions.size) / dense_bytes == 9 / 16


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("group_size", [-1, 32])
def test_quantised_round_trip(bits, group_size):
    packed = sparse_checkpoint(bits, 608, 5, group_size)
    weight = jax.jit(functools.partial(from_codes, bits=bits))(*packed)
    for before, after in zip(packed, jax.jit(to_codes)(weight), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)
    np.testing.assert_allclose(to_dense(weight), reference.dense(weight), rtol=1e-6)


@pytest.mark.parametrize("backend", ["pallas_tpu", "xla"])
@pytest.mark.parametrize("rows, dtype", [(3, "bfloat16"), (17, "float32")])
def test_value_and_gradient(backend, rows, dtype):
    _check(from_dense(sparse_matrix(320, 136)), rows, dtype, backend=backend, interpret=True)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_quantised_value_and_gradient(bits, group_size):
    weight = from_codes(*sparse_checkpoint(bits, 384, 72, group_size), bits=bits)
    _check(weight, 3, "float32", backend="pallas_tpu", interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 3])
def test_edges_of_blocks(bits, monkeypatch):
    monkeypatch.setattr(sizes, "blocks", lambda *_: sizes.Blocks(16, 128, 512))
    if bits is None:
        weight = from_dense(sparse_matrix(1020, 200))
    else:
        weight = from_codes(*sparse_checkpoint(bits, 992, 200, 32), bits=bits)
    _check(weight, 17, "bfloat16", backend="pallas_tpu", interpret=True)


def test_bad_input():
    with pytest.raises(ValueError, match="more than 2 of 4 consecutive inputs are not zero"):
        from_dense(jnp.ones((8, 2), jnp.bfloat16))
    with pytest.raises(ValueError, match="6 inputs are no multiple of 4"):
        from_dense(jnp.ones((6, 2), jnp.bfloat16))
    with pytest.raises(ValueError, match="weights are float32"):
        from_dense(jnp.ones((8, 2), jnp.float32))
    weight = from_dense(sparse_matrix(8, 4))
    with pytest.raises(ValueError, match="x has 7 features, the weight has 8"):
        sparse24_matmul(jnp.ones((1, 7), jnp.float32), weight)
    with pytest.raises(ValueError, match="pallas_tpu cannot serve: it needs a TPU"):
        sparse24_matmul(jnp.ones((1, 8), jnp.float32), weight, backend="pallas_tpu")
