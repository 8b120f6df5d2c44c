"""A stage on a mesh of eight fake devices against the same products on one."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.kernels.stack import select_layer
from idp_jax.sharding import constrain_parts, make_mesh
from idp_jax.weights import Dense, Lora, Quantized, Repacked, products, repack
from tests.kernels.problems import checkpoint

INPUTS, OUTPUTS = 1024, 256
AXES = {"outputs": ("embed", "heads"), "inputs": ("heads", "embed")}


def _quantized(bits=3, groups=8, order=False, kept=None, outputs=OUTPUTS) -> Quantized:
    words, scales, zeros = checkpoint(bits, INPUTS, outputs, groups, kept=kept)
    index = None
    if order:
        index = np.random.default_rng(1).permutation(np.arange(INPUTS) * groups // INPUTS)
        index = jnp.asarray(index, jnp.int32)
    return Quantized(words, scales, zeros, bits=bits, group_index=index)


def _numbers(seed: int, *shape: int, dtype="float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _sparse() -> Dense:
    kept = jnp.arange(INPUTS)[:, None] % 4 < 2
    return Dense(jnp.where(kept, _numbers(2, INPUTS, OUTPUTS, dtype="bfloat16"), 0))


def _kernel(weight, backend: str, sparse: bool = False) -> Repacked:
    repacked = repack(weight, backend=backend, use_sparse24=sparse)
    assert isinstance(repacked, Repacked)
    repacked.backend = "xla"  # which multiplies by any layout
    return repacked


def _lora(base) -> Lora:
    return Lora(base, _numbers(3, INPUTS, 4) / 32, _numbers(4, 4, OUTPUTS), 0.5)


def _kept():
    return np.arange(INPUTS)[:, None] % 4 < 2


WEIGHTS = {
    "dense": lambda: Dense(_numbers(0, INPUTS, OUTPUTS), _numbers(1, OUTPUTS)),
    "grouped": _quantized,
    "one group": partial(_quantized, 4, 1),
    "act-order": partial(_quantized, order=True),
    "kernel": lambda: _kernel(_quantized(), "pallas_tpu"),
    "kernel, one group": lambda: _kernel(_quantized(4, 1), "pallas_tpu"),
    "kernel, act-order": lambda: _kernel(_quantized(order=True), "pallas_tpu"),
    "kernel, fragments": lambda: _kernel(_quantized(), "mosaic_gpu"),
    "sparse": lambda: _kernel(_sparse(), "pallas_tpu", sparse=True),
    "sparse, fragments": lambda: _kernel(_sparse(), "mosaic_gpu", sparse=True),
    "sparse codes": lambda: _kernel(_quantized(kept=_kept()), "pallas_tpu", sparse=True),
    "uneven": partial(_quantized, outputs=255),
    "lora": lambda: _lora(Dense(_numbers(0, INPUTS, OUTPUTS), _numbers(1, OUTPUTS))),
    "lora, act-order": lambda: _lora(_kernel(_quantized(order=True), "pallas_tpu")),
}
MESHES = [{"data": 2, "fsdp": 2, "model": 2}, {"fsdp": 8}, {"data": 4, "model": 2}]


def _trained(weight) -> list[jax.Array]:
    return [weight.a[...], weight.b[...]] if isinstance(weight, Lora) else []


def _with(weight, learnt: list[jax.Array]):
    return Lora(weight.base, *learnt, weight.scale) if learnt else weight


def _slopes(weight, axes, x, upstream):
    """A stage's result, and the gradients of its input and of what is trained."""

    def value(x, learnt):
        (y,) = products(x, [_with(weight, learnt)], [axes])
        return (y * upstream).sum(), y

    (_, y), slopes = jax.value_and_grad(value, (0, 1), has_aux=True)(x, _trained(weight))
    return y, slopes


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("split", AXES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_value_and_gradients(kind, split, mesh):
    weight, axes = WEIGHTS[kind](), AXES[split]
    outputs = 255 if kind == "uneven" else OUTPUTS
    x, upstream = _numbers(5, 8, 2, INPUTS), _numbers(6, 8, 2, outputs)
    expected = _slopes(weight, axes, x, upstream)
    with jax.set_mesh(make_mesh(mesh)):
        place = jax.jit(lambda weight: constrain_parts(weight, weight.logical_axes(*axes)))
        found = jax.jit(_slopes, static_argnums=1)(place(weight), axes, x, upstream)
    for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("rows", [1, 8])
def test_several_matrices_reduce_the_gradient_of_their_input_once(rows):
    """Also where one of them cannot be cut, and where rows are too few to be."""
    weights = [_quantized(), _lora(_quantized(4)), _quantized(outputs=255)]
    axes = [AXES["outputs"]] * 3
    x, learnt = _numbers(5, rows, 2, INPUTS), _trained(weights[1])

    def value(x, learnt):
        stage = [weights[0], _with(weights[1], learnt), weights[2]]
        return sum((y * y).sum() for y in products(x, stage, axes))

    slopes = jax.grad(value, (0, 1))
    expected = slopes(x, learnt)
    with jax.set_mesh(make_mesh(MESHES[0])):
        program = jax.jit(slopes).lower(x, learnt).compile()
        found = program(x, learnt)
        text = program.as_text()
    for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=2e-4, atol=2e-3 * np.abs(wanted).max())
    reduced = re.findall(r" = (.*) all-reduce\(", text)
    assert sum(f",2,{INPUTS}]" in shapes for shapes in reduced) == 1


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("groups", [1, 10])
def test_inputs_that_do_not_divide_are_filled_up(groups, order):
    inputs = 1280  # five tiles, and ten groups of 128
    words, scales, zeros = checkpoint(3, inputs, OUTPUTS, groups)
    index = np.random.default_rng(1).permutation(np.arange(inputs) * groups // inputs)
    index = jnp.asarray(index, jnp.int32) if order else None
    weight = Quantized(words, scales, zeros, bits=3, group_index=index)
    repacked = repack(weight, backend="pallas_tpu", parts=4)
    assert isinstance(repacked, Repacked)
    assert repacked.filled == 768 and repacked.divides("inputs", 4)
    repacked.backend = "xla"
    for ours, read in zip(
        jax.tree.leaves(repacked.restored()), jax.tree.leaves(weight), strict=True
    ):
        np.testing.assert_array_equal(ours, read)
    x, upstream = _numbers(5, 8, 2, inputs), _numbers(6, 8, 2, OUTPUTS)
    expected = _slopes(weight, AXES["inputs"], x, upstream)
    alone = _slopes(repacked, AXES["inputs"], x, upstream)
    with jax.set_mesh(make_mesh({"data": 2, "model": 4})):
        found = jax.jit(_slopes, static_argnums=1)(repacked, AXES["inputs"], x, upstream)
    for wanted, *ours in zip(*map(jax.tree.leaves, (expected, alone, found)), strict=True):
        for value in ours:
            np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=2e-3)


def test_a_layer_of_a_stack_is_gathered_as_it_is_stored():
    layers = [_quantized(), _quantized(4 - 1)]
    stack = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    stack = repack(stack, backend="pallas_tpu")
    assert isinstance(stack, Repacked)
    one = Repacked(select_layer(stack.packed.get_value(), jnp.int32(1)), backend="xla")
    x, axes = _numbers(5, 8, 2, INPUTS), AXES["outputs"]
    with jax.set_mesh(make_mesh(MESHES[0])):
        (y,) = jax.jit(lambda one, x: products(x, [one], [axes]))(one, x)
    np.testing.assert_allclose(y, layers[1](x), rtol=1e-4, atol=2e-3)
