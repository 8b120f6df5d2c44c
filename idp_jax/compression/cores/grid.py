"""Quantisation grids: where the levels of a row, or of a group of it, lie, and rounding to them.

Invariant: every scale is a float16 number from the start, because that is what a checkpoint stores:
what the algorithms optimise is bit for bit what a reader of the file gets. Conventions are those of
the GPTQ paper's public quantizer (min-max per row, range always around 0).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST

GRID_BITS = (2, 3, 4, 8)
# The largest float16, and its smallest positive (subnormal) number: a scale outside would be stored
# as inf or 0.
_LARGEST_SCALE = 65504.0
_SMALLEST_SCALE = 2.0**-24
# The search for the best range: how many widths, and the largest part of min-max that is cut off.
_SHRINK_STEPS = 32
_LARGEST_SHRINK = 0.8


class QuantizedMatrix(NamedTuple):
    """A matrix [O, I] on a grid, w = scale * (code - zero).

    codes uint8 [O, I], scales float32 [O, G] (float16 numbers), zeros uint8 [O, G]; a group is a
    run of I // G inputs.
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array


def find_grid(
    weights: jax.Array, bits: int, symmetric: bool, importance: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Grid of every row: min-max, or the shrunken one that rounds with the least error.

    Args:
      weights: float32 [O, I], the columns of one group.
      bits: 2, 3, 4 or 8.
      symmetric: whether the range is [-max|w|, max|w|] with the zero at 2^(bits - 1), not [min(w,
        0), max(w, 0)].
      importance: float32 [I], what a squared error of each column costs; given, the range is
        searched for the least cost, otherwise it is min-max.

    Returns:
      scale [O] and zero [O], float32.

    Raises:
      ValueError: for another number of bits.
    """
    if bits not in GRID_BITS:
        raise ValueError(f"bits must be one of {GRID_BITS}, not {bits}")
    columns = weights.T  # sums over the leading axis keep the vector units busy
    low = jnp.minimum(jnp.min(columns, axis=0), 0.0)
    high = jnp.maximum(jnp.max(columns, axis=0), 0.0)
    if symmetric:
        high = jnp.maximum(-low, high)
        low = -high
    empty = (low == 0.0) & (high == 0.0)
    low, high = jnp.where(empty, -1.0, low), jnp.where(empty, 1.0, high)
    if importance is None:
        return _grid_of_range(low, high, bits, symmetric)

    def try_width(step: jax.Array, best):
        width = 1.0 - step.astype(jnp.float32) * (_LARGEST_SHRINK / _SHRINK_STEPS)
        scale, zero = _grid_of_range(low * width, high * width, bits, symmetric)
        # In steps of the grid, from the zero, which is one of the levels itself.
        exact = columns / scale
        steps = jnp.clip(jnp.round(exact), -zero, float(2**bits - 1) - zero)
        missed = jnp.square(exact - steps)
        cost = jnp.matmul(importance, missed, precision=_HIGHEST) * jnp.square(scale)
        better = cost < best[0]
        return tuple(
            jnp.where(better, a, b) for a, b in zip((cost, scale, zero), best, strict=True)
        )

    start = (jnp.full_like(low, jnp.inf), *_grid_of_range(low, high, bits, symmetric))
    _, scale, zero = jax.lax.fori_loop(0, _SHRINK_STEPS, try_width, start)
    return scale, zero


def _grid_of_range(
    low: jax.Array, high: jax.Array, bits: int, symmetric: bool
) -> tuple[jax.Array, jax.Array]:
    levels = float(2**bits - 1)
    scale = jnp.clip((high - low) / levels, _SMALLEST_SCALE, _LARGEST_SCALE)
    scale = scale.astype(jnp.float16).astype(jnp.float32)
    if symmetric:
        return scale, jnp.full_like(scale, float(2 ** (bits - 1)))
    return scale, jnp.clip(jnp.round(-low / scale), 0.0, levels)


def find_grids(
    columns: jax.Array, bits: int, symmetric: bool, importance: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Grids of all groups of a transposed matrix.

    Args:
      columns: float32 [G, size, O].
      importance: float32 [G, size] or None, see `find_grid`.

    Returns:
      scales and zeros [G, O], float32.
    """
    if importance is None:
        return jax.lax.map(lambda group: find_grid(group.T, bits, symmetric), columns)
    grid = lambda group: find_grid(group[0].T, bits, symmetric, group[1])
    return jax.lax.map(grid, (columns, importance))


def quantize(weights: jax.Array, scale: jax.Array, zero: jax.Array, bits: int) -> jax.Array:
    """Nearest levels of weights (shapes broadcast): float32 whole numbers in 0 .. 2^bits - 1."""
    return jnp.clip(jnp.round(weights / scale) + zero, 0.0, float(2**bits - 1))


def dequantize(codes: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """Weights at the given levels (shapes broadcast), float32."""
    return scale * (codes.astype(jnp.float32) - zero.astype(jnp.float32))


def dequantize_matrix(matrix: QuantizedMatrix) -> jax.Array:
    """The weights [O, I] that a quantised matrix stands for, float32."""
    outputs, inputs = matrix.codes.shape
    codes = matrix.codes.reshape(outputs, matrix.scales.shape[1], -1)
    weights = dequantize(codes, matrix.scales[:, :, None], matrix.zeros[:, :, None])
    return weights.reshape(outputs, inputs)


def resolve_group_size(inputs: int, group_size: int) -> int:
    """Columns of a group, for -1 (the whole row) or a size that divides the inputs.

    Raises:
      ValueError: if the size does not divide the inputs.
    """
    if group_size == -1:
        return inputs
    if group_size <= 0 or inputs % group_size:
        raise ValueError(
            f"group_size {group_size} does not divide {inputs} inputs: "
            "choose a divisor, or -1 for whole rows"
        )
    return group_size
