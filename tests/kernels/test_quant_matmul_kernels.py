"""Every backend of the product with packed weights against float64, in value and gradient.

The TPU kernels run interpreted.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.kernels import dispatch
from idp_jax.kernels.packing import BIT_WIDTHS
from idp_jax.kernels.quant_matmul import reference, sizes
from idp_jax.kernels.quant_matmul.api import prepare, quant_matmul
from tests.kernels.problems import check, checkpoint, groups_of

_check = functools.partial(check, quant_matmul, reference.quant_matmul, reference.gradient)


def _weight(bits, inputs, outputs, group_size, *, symmetric=False, dead=False, act_order=False):
    groups = groups_of(inputs, group_size)
    words, scales, zeros = checkpoint(bits, inputs, outputs, groups)
    if dead:
        scales = scales.at[groups // 2].set(0)
    scales = scales.at[0, 0].set(6e-8)  # the least float16
    if symmetric:
        zeros = jnp.full_like(zeros, 2 ** (bits - 1))
    index = None
    if act_order:
        index = np.random.default_rng(bits).permutation(np.arange(inputs) // (inputs // groups))
        index = jnp.asarray(index, jnp.int32)
    return prepare(words, scales, zeros, bits=bits, group_index=index)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True])
def test_value_and_gradient(bits, group_size, symmetric):
    weight = _weight(bits, 384, 136, group_size, symmetric=symmetric, dead=group_size != -1)
    # Few rows take the decode kernel, many the other; the gradient always takes the other.
    for rows, dtype in ((3, "bfloat16"), (sizes.DECODE_ROWS + 1, "float32")):
        _check(weight, rows, dtype, backend="pallas_tpu", interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("rows, dtype", [(1, "float32"), (67, "bfloat16")])
def test_edges_of_blocks(bits, rows, dtype, monkeypatch):
    blocks = sizes.Blocks(32, 128, 512)
    monkeypatch.setattr(sizes, "prefill_blocks", lambda *_: blocks)
    monkeypatch.setattr(sizes, "decode_outputs", lambda *_: 128)
    weight = _weight(bits, 32 * 37, 200, 32)
    _check(weight, rows, dtype, backend="pallas_tpu", interpret=True)


@pytest.mark.parametrize("backend", ["pallas_tpu", "xla"])
def test_act_order(backend):
    weight = _weight(3, 256, 64, 64, act_order=True)
    _check(weight, 5, "float32", backend=backend, interpret=True)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_xla(bits):
    _check(_weight(bits, 288, 40, 32, dead=True), 5, "float32", backend="xla")
    _check(_weight(bits, 288, 40, -1), 5, "bfloat16")


def test_reference_backend_and_batches():
    weight = _weight(4, 64, 8, 32)
    x = jnp.ones((2, 3, 64), jnp.float32)
    y = quant_matmul(x, weight, backend="reference")
    assert y.shape == (2, 3, 8)
    np.testing.assert_allclose(y, quant_matmul(x, weight), rtol=1e-5, atol=1e-4)
    assert quant_matmul(x[:, :0], weight).shape == (2, 0, 8)


def test_a_named_backend_serves_or_says_why():
    weight = _weight(4, 64, 8, 32)
    x = jnp.ones((1, 64), jnp.float32)
    with pytest.raises(ValueError, match="pallas_tpu cannot serve: it needs a TPU"):
        quant_matmul(x, weight, backend="pallas_tpu")
    with pytest.raises(ValueError, match="mosaic_gpu cannot serve: it needs a GPU"):
        quant_matmul(x, weight, backend="mosaic_gpu")
    with pytest.raises(ValueError, match="reference cannot serve: it works on concrete arrays"):
        jax.jit(functools.partial(quant_matmul, backend="reference"))(x, weight)
    with pytest.raises(ValueError, match="backend must be auto or one of"):
        quant_matmul(x, weight, backend="triton")
    with pytest.raises(ValueError, match="group size 96 is not"):
        quant_matmul(
            x[:, :1].repeat(192, 1), _weight(4, 192, 8, 96), backend="pallas_tpu", interpret=True
        )
    with pytest.raises(ValueError, match="x has 63 features, the weight has 64"):
        quant_matmul(x[:, :63], weight)


def test_a_fallback_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "best_backend", lambda: "mosaic_gpu")
    monkeypatch.setattr(dispatch, "_told", set())
    weight = _weight(4, 64, 8, 32)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            quant_matmul(jnp.ones((1, 64), jnp.float32), weight)
    assert [r.message for r in caplog.records] == [
        "quant_matmul: mosaic_gpu cannot serve (it needs a GPU, this process computes on cpu); "
        "using xla"
    ]


def test_backward_keeps_no_expanded_weight():
    weight = _weight(3, 384, 136, 128)
    product = functools.partial(quant_matmul, weight=weight, backend="pallas_tpu", interpret=True)
    _, pull_back = jax.vjp(product, jnp.ones((1, 384), jnp.float32))
    assert max(leaf.size for leaf in jax.tree.leaves(pull_back)) == weight.words.size
