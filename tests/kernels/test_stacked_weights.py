"""A layer multiplied where it lies in a stack, against the same layer cut out of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.kernels.quant_matmul import api as quant
from idp_jax.kernels.quant_matmul import mosaic_gpu as quant_gpu
from idp_jax.kernels.sparse24_matmul import api as sparse
from idp_jax.kernels.sparse24_matmul import mosaic_gpu as sparse_gpu
from idp_jax.kernels.stack import select_layer, slice_layer
from tests.kernels.problems import checkpoint, gpu_interpreter, sparse_mask, sparse_matrix

_LAYERS = 3
_PALLAS = {"backend": "pallas_tpu", "interpret": True}
KINDS = ("quantised", "act-order", "sparse", "sparse codes")


def _stack(kind: str, backend: str):
    """The product and a stack of weights [1024, 128] for a backend."""
    if kind == "sparse":
        layers = [sparse_matrix(1024, 128) * (n + 1) for n in range(_LAYERS)]
        make = functools.partial(sparse.from_dense, backend=backend)
        return sparse.sparse24_matmul, jax.vmap(make)(jnp.stack(layers).astype(jnp.bfloat16))
    kept = sparse_mask(1024, 128) if kind == "sparse codes" else None
    packed = checkpoint(4, 1024, 128, 8, layers=(_LAYERS,), kept=kept)
    if kind == "sparse codes":
        make = functools.partial(sparse.from_codes, bits=4, backend=backend)
        return sparse.sparse24_matmul, jax.vmap(make)(*packed)
    index = None
    if kind == "act-order":
        groups = np.arange(1024, dtype=np.int32) // 128
        index = jnp.stack([jnp.asarray(np.roll(groups, n)) for n in range(_LAYERS)])
    return quant.quant_matmul, quant.prepare(*packed, bits=4, group_index=index, backend=backend)


def _layer(stack, number: int):
    return jax.tree.map(lambda array: array[number], stack)


def _x(rows: int, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(rows).normal(size=(rows, 1024)), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [_PALLAS, {"backend": "xla"}], ids=["pallas_tpu", "xla"])
@pytest.mark.parametrize("rows", [2, 70])
def test_a_layer_in_its_stack(kind, options, rows):
    multiply, stack = _stack(kind, options["backend"])
    multiply = functools.partial(multiply, **options)

    @jax.jit
    def value_and_gradient(x, weight):
        y, pull_back = jax.vjp(lambda x: multiply(x, weight), x)
        return y, pull_back(y)[0]

    # XLA has no product of gathered bfloat16 rows on a CPU.
    x = _x(rows, "float32" if kind == "act-order" else "bfloat16")
    for number in range(_LAYERS):
        ours = value_and_gradient(x, select_layer(stack, jnp.int32(number)))
        expected = value_and_gradient(x, _layer(stack, number))
        for array, wanted in zip(ours, expected, strict=True):
            np.testing.assert_array_equal(array, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["quantised", "sparse", "sparse codes"])
def test_a_layer_in_its_stack_on_a_gpu(kind):
    _, stack = _stack(kind, "mosaic_gpu")
    kernel = quant_gpu.quant_matmul if kind == "quantised" else sparse_gpu.sparse24_matmul
    multiply = functools.partial(kernel, interpret=gpu_interpreter())
    for number in (0, _LAYERS - 1):
        expected = multiply(_x(3), _layer(stack, number))
        np.testing.assert_array_equal(
            multiply(_x(3), select_layer(stack, jnp.int32(number))), expected
        )


def test_a_slice_is_the_layer():
    _, stack = _stack("act-order", "xla")
    for ours, wanted in zip(
        jax.tree.leaves(slice_layer(select_layer(stack, jnp.int32(2)))),
        jax.tree.leaves(_layer(stack, 2)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("remat", [False, True])
def test_walking_layers_stores_no_weight_again(remat):
    """What the backward pass of a walk keeps is x of every layer, not the stack of every layer."""
    multiply, stack = _stack("quantised", "pallas_tpu")
    square = jnp.eye(128, 1024, dtype=jnp.bfloat16)

    def step(x, number):
        return multiply(x, select_layer(stack, number), **_PALLAS) @ square, None

    step = jax.checkpoint(step, prevent_cse=False) if remat else step
    numbers = jnp.arange(_LAYERS, dtype=jnp.int32)
    _, pull_back = jax.vjp(lambda x: jax.lax.scan(step, x, numbers)[0], _x(2))
    sizes = [leaf.size for leaf in jax.tree.leaves(pull_back)]
    assert max(sizes) <= max(stack.words.size, square.size * _LAYERS)
    assert sizes.count(stack.words.size) <= 1
