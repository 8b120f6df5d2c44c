"""The kernels as a GPU and a TPU get them, lowered on a machine that has neither.

JAX's interpreter takes other branches. Nothing is compiled or run here, but a function of Pallas
that a release of JAX changed is found.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from idp_jax.kernels.quant_matmul import mosaic_gpu as quant_gpu
from idp_jax.kernels.quant_matmul import pallas_tpu as quant_tpu
from idp_jax.kernels.quant_matmul.layout import repack
from idp_jax.kernels.sparse24_matmul import mosaic_gpu as sparse_gpu
from idp_jax.kernels.sparse24_matmul import pallas_tpu as sparse_tpu
from idp_jax.kernels.sparse24_matmul.layout import from_codes, from_dense

_INPUTS, _OUTPUTS, _GROUPS = 1024, 256, 8
_KINDS = [("quantised", 3), ("quantised", 8), ("sparse", None), ("sparse codes", 4)]


def _weight(kind: str, bits: int | None, arrangement: str):
    """A weight that has shapes and no values."""
    struct = jax.ShapeDtypeStruct
    if bits is None:
        dense = struct((_INPUTS, _OUTPUTS), jnp.bfloat16)
        return jax.eval_shape(functools.partial(from_dense, arrangement=arrangement), dense)
    make = repack if kind == "quantised" else from_codes
    return jax.eval_shape(
        functools.partial(make, bits=bits, arrangement=arrangement),
        struct((_INPUTS * bits // 32, _OUTPUTS), jnp.int32),
        struct((_GROUPS, _OUTPUTS), jnp.float16),
        struct((_GROUPS, _OUTPUTS), jnp.uint8),
    )


def _lowered(platform: str, multiply, weight, rows: int, dtype: str) -> str:
    """The program of a value and its gradient in x."""

    def both(x, upstream, weight):
        y, pull_back = jax.vjp(lambda x: multiply(x, weight), x)
        return y, pull_back(upstream)

    x, upstream = (jax.ShapeDtypeStruct((rows, n), dtype) for n in (_INPUTS, _OUTPUTS))
    traced = jax.jit(both).trace(x, upstream, weight)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("rows, dtype", [(1, "bfloat16"), (16, "float32")])
@pytest.mark.parametrize("kind, bits", _KINDS)
def test_lowers_for_a_gpu(kind, bits, rows, dtype):
    multiply = quant_gpu.quant_matmul if kind == "quantised" else sparse_gpu.sparse24_matmul
    text = _lowered("cuda", multiply, _weight(kind, bits, "fragments"), rows, dtype)
    assert text.count("custom_call @mosaic_gpu") == 1  # the gradient is XLA's


@pytest.mark.parametrize("rows, dtype", [(1, "bfloat16"), (256, "float32")])
@pytest.mark.parametrize("kind, bits", _KINDS)
def test_lowers_for_a_tpu(kind, bits, rows, dtype):
    multiply = quant_tpu.quant_matmul if kind == "quantised" else sparse_tpu.sparse24_matmul
    text = _lowered("tpu", multiply, _weight(kind, bits, "rows"), rows, dtype)
    assert text.count("custom_call @tpu_custom_call") == 2
