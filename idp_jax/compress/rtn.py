"""Round to nearest: every weight to the nearest level of its own grid, no data needed. The baseline
of all quantisation.
"""

import functools

import jax
import jax.numpy as jnp

from idp_jax.compress.grid import QuantizedMatrix, find_grid, quantize, resolve_group_size


@functools.partial(jax.jit, static_argnames=("bits", "group_size", "symmetric", "grid"))
def rtn(
    weights: jax.Array,
    *,
    bits: int,
    group_size: int = -1,
    symmetric: bool = False,
    grid: str = "minmax",
    mask: jax.Array | None = None,
) -> QuantizedMatrix:
    """Quantises a matrix by rounding.

    Args:
      weights: float32 [O, I].
      bits: 2, 3, 4 or 8.
      group_size: columns that share a scale and zero; -1 for the whole row.
      symmetric: whether the grid is symmetric about 0 (see `find_grid`).
      grid: "minmax", or "mse" for the range with the least squared error of the weights.
      mask: bool [O, I], True where the weight becomes exactly 0.

    Returns:
      The matrix on its grid.

    Raises:
      ValueError: for another number of bits, or a group size that does not divide I.
    """
    outputs, inputs = weights.shape
    group = resolve_group_size(inputs, group_size)
    rows = (weights if mask is None else jnp.where(mask, 0.0, weights)).reshape(-1, group)
    importance = jnp.ones(group, jnp.float32) if grid == "mse" else None
    scale, zero = find_grid(rows, bits, symmetric, importance)
    codes = quantize(rows, scale[:, None], zero[:, None], bits)
    return QuantizedMatrix(
        codes.reshape(outputs, inputs).astype(jnp.uint8),
        scale.reshape(outputs, -1),
        zero.reshape(outputs, -1).astype(jnp.uint8),
    )
