"""Random weights for the kernels, and how near a product must come to float64.

Invariant: a problem is made from its arguments alone, so every test sees the same numbers again.

    packed = checkpoint(3, 256, 40, 8)  # words, scales, zeros in eight groups
    check(quant_matmul, reference.quant_matmul, reference.gradient, weight, 5, "float32")
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu

from idp_jax.kernels.packing import pack

# Of the largest entry. bfloat16 keeps 8 bits: the weight and the result are each rounded by up to
# 2^-9. float32 sums a few hundred products, the codes' offset adding two bits.
_TOLERANCE = {"bfloat16": 2**-7, "float32": 4e-6}


def groups_of(inputs: int, group_size: int) -> int:
    """How many groups there are; a size of -1 is one group of all inputs."""
    return 1 if group_size == -1 else inputs // group_size


def checkpoint(
    bits: int, inputs: int, outputs: int, groups: int, *, dtype=np.float16, layers=(), kept=None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Words int32 [..., I * bits / 32, O], scales and zeros uint8 [..., G, O], as GPTQ has them.

    Args:
        dtype: of the scales.
        layers: leading axes.
        kept: bool [I, O], the codes that may differ from zero; all of them by default.
    """
    rng = np.random.default_rng(bits + inputs)
    codes = rng.integers(0, 2**bits, (*layers, inputs, outputs)).astype(np.uint8)
    scales = rng.normal(size=(*layers, groups, outputs)).astype(dtype)
    zeros = rng.integers(0, 2**bits, (*layers, groups, outputs)).astype(np.uint8)
    if kept is not None:
        codes = np.where(kept, codes, np.repeat(zeros, inputs // groups, -2))
    return pack(jnp.asarray(codes), bits, axis=-2), jnp.asarray(scales), jnp.asarray(zeros)


def sparse_checkpoint(bits: int, inputs: int, outputs: int, group_size: int):
    """A `checkpoint` whose codes are 2:4 sparse; a group size of -1 is one group of all inputs."""
    kept = sparse_mask(inputs, outputs)
    return checkpoint(bits, inputs, outputs, groups_of(inputs, group_size), kept=kept)


def sparse_mask(inputs: int, outputs: int) -> np.ndarray:
    """Bool [I, O]: two, one or none of every four inputs, anywhere."""
    rng = np.random.default_rng(inputs)
    order = rng.random((inputs // 4, 4, outputs)).argsort(axis=1)
    return (order < rng.integers(0, 3, (inputs // 4, 1, outputs))).reshape(inputs, outputs)


def sparse_matrix(inputs: int, outputs: int) -> jax.Array:
    """A 2:4 matrix bfloat16 [I, O]."""
    values = np.random.default_rng(outputs).normal(size=(inputs, outputs))
    return jnp.asarray(values * sparse_mask(inputs, outputs), "bfloat16")


@functools.partial(jax.jit, static_argnames=("multiply", "backend", "interpret"))
def _value_and_gradient(x, upstream, weight, *, multiply, **options):
    y, pull_back = jax.vjp(functools.partial(multiply, weight=weight, **options), x)
    return y, pull_back(upstream)[0]


def check(multiply, product, gradient, weight, rows: int, dtype: str, **options) -> None:
    """Compares a product and its gradient in x with float64, for random x and upstream gradient.

    Args:
        multiply: of (x, weight, **options); a function, not a new object for every call.
        product: the exact one, of (x, weight).
        gradient: the exact one, of (upstream, weight).
        weight: the weight.
        rows: of x.
        dtype: of x.
        options: backend and interpret.
    """
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.normal(size=(rows, weight.inputs)), dtype)
    upstream = jnp.asarray(rng.normal(size=(rows, weight.outputs)), dtype)
    ours = _value_and_gradient(x, upstream, weight, multiply=multiply, **options)
    assert_near(ours, (product(x, weight), gradient(upstream, weight)), dtype)


def check_interpreted(multiply, product, gradient, weight, rows: int, dtype: str) -> None:
    """`check` of a GPU kernel's walk over the matrix, which JAX interprets.

    Args:
        multiply: of (x, weight, interpret).
        product: the exact one, of (x, weight).
        gradient: the exact one, of (upstream, weight).
        weight: the weight, arranged as "fragments".
        rows: of x.
        dtype: of x.
    """
    x = jnp.asarray(np.random.default_rng(rows).normal(size=(rows, weight.inputs)), dtype)
    interpret = gpu_interpreter()
    y, pull_back = jax.vjp(lambda x: multiply(x, weight, interpret=interpret), x)
    assert_near((y, *pull_back(y)), (product(x, weight), gradient(y, weight)), dtype)


def gpu_interpreter():
    """The parameters with which JAX interprets a GPU kernel; skips a test where it has none."""
    module = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    return module.InterpretGPUParams()


def assert_near(ours, exact, dtype: str) -> None:
    """Every array must have the dtype, and errors below its tolerance."""
    for array, wanted in zip(ours, exact, strict=True):
        assert array.dtype == dtype
        error = np.abs(np.asarray(array, np.float64) - wanted).max() / np.abs(wanted).max()
        assert error <= _TOLERANCE[dtype], error


def places_in_registers(columns: int) -> tuple[np.ndarray, ...]:
    """Where Mosaic's description of a tensor core operand [64, columns] puts its entries.

    Returns:
        Thread of the warpgroup, register of the thread and half of the register, all [64, columns].
    """
    layout = mgpu.WGMMA_LAYOUT
    index = list(layout.tiling.tile_indices(tuple(np.indices((64, columns)))))
    lane = 4 * index[layout.lane_dims[0]] + index[layout.lane_dims[1]]
    thread, half = 32 * index[layout.warp_dims[0]] + lane, index[layout.vector_dim]
    for dimension in (*layout.lane_dims, *layout.warp_dims, layout.vector_dim):
        index[dimension] = np.zeros_like(lane)
    register = np.ravel_multi_index(index, layout.registers_shape((64, columns)))
    return thread, register, half


def halves_of_registers(sets) -> np.ndarray:
    """What threads hold of sets of words int32 [2, 256]: float32 [128 threads, registers, 2].

    Thread t has words 4 t .. 4 t + 3 of every set, in the order of the sets.
    """
    words = jnp.stack(list(sets)).reshape(-1, 128, 4).swapaxes(0, 1).reshape(128, -1)
    return np.asarray(jax.lax.bitcast_convert_type(words, jnp.bfloat16), np.float32)
