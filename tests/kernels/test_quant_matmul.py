"""The XLA path against float64 NumPy, in value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.kernels.packing import BIT_WIDTHS, pack
from idp_jax.kernels.quant_matmul.xla import dequantize, quant_matmul

_INPUTS, _OUTPUTS, _GROUPS = 96, 40, 3


def _problem(bits: int, act_order: bool = False):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (_INPUTS, _OUTPUTS)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.1, (_GROUPS, _OUTPUTS)).astype(np.float16)
    zeros = rng.integers(0, 2**bits, (_GROUPS, _OUTPUTS)).astype(np.uint8)
    group_index = np.arange(_INPUTS) // (_INPUTS // _GROUPS)
    if act_order:
        group_index = rng.permutation(group_index)
    centred = codes.astype(np.float64) - zeros.astype(np.float64)[group_index]
    weights = scales.astype(np.float64)[group_index] * centred
    words = pack(jnp.asarray(codes), bits)
    index = jnp.asarray(group_index, jnp.int32) if act_order else None
    return (words, jnp.asarray(scales), jnp.asarray(zeros)), index, weights


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("act_order", [False, True])
def test_value_and_gradient(bits, act_order):
    packed, index, weights = _problem(bits, act_order)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 5, _INPUTS)).astype(np.float32)
    upstream = rng.normal(size=(2, 5, _OUTPUTS)).astype(np.float32)
    np.testing.assert_allclose(
        dequantize(*packed, bits=bits, group_index=index), weights, rtol=1e-6, atol=1e-7
    )

    @jax.jit
    def product(x):
        return quant_matmul(x, *packed, bits=bits, group_index=index)

    y, pull_back = jax.vjp(product, jnp.asarray(x))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, x @ weights, rtol=1e-4, atol=1e-4)
    (gradient,) = pull_back(jnp.asarray(upstream))
    np.testing.assert_allclose(gradient, upstream @ weights.T, rtol=1e-4, atol=1e-4)


def test_bfloat16_in_bfloat16_out():
    packed, _, weights = _problem(4)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, _INPUTS)), jnp.bfloat16)
    y = quant_matmul(x, *packed, bits=4)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ weights
    # Weights and results are rounded to 8 bits of mantissa.
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=0.02, atol=0.05)


def test_vmap_over_stacked_weights():
    packed = [_problem(bits)[0] for bits in (3, 3)]
    stacked = [jnp.stack(leaves) for leaves in zip(*packed, strict=True)]
    x = jnp.ones((2, 4, _INPUTS), jnp.float32)
    product = functools.partial(quant_matmul, bits=3)
    y = jax.vmap(product)(x, *stacked)
    np.testing.assert_allclose(y[1], product(x[1], *packed[1]), rtol=1e-6)


def test_backward_pass_stores_no_expanded_weight():
    packed, _, _ = _problem(3)
    x = jnp.ones((1, _INPUTS), jnp.float32)
    _, pull_back = jax.vjp(lambda x: quant_matmul(x, *packed, bits=3), x)
    sizes = [leaf.size for leaf in jax.tree.leaves(pull_back)]
    assert max(sizes) < _INPUTS * _OUTPUTS


def test_bad_shapes():
    (words, scales, zeros), _, _ = _problem(4)
    with pytest.raises(ValueError, match="x has 95 features but the 4-bit words hold 96 inputs"):
        quant_matmul(jnp.ones((1, 95), jnp.float32), words, scales, zeros, bits=4)
    with pytest.raises(ValueError, match="96 inputs do not divide into 5 groups"):
        dequantize(words, jnp.ones((5, _OUTPUTS)), jnp.ones((5, _OUTPUTS), jnp.uint8), bits=4)
    with pytest.raises(ValueError, match="must have the shape of scales"):
        dequantize(words, scales, zeros[:2], bits=4)
