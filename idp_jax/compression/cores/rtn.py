"""Round to nearest, the baseline of all quantisation; no data needed."""

import functools

import jax
import jax.numpy as jnp

from idp_jax.compression.cores.grid import QuantizedMatrix, find_grids, quantize, resolve_group_size


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
    kept = weights if mask is None else jnp.where(mask, 0.0, weights)
    columns = kept.T.reshape(-1, group, outputs)
    importance = jnp.ones(columns.shape[:2], jnp.float32) if grid == "mse" else None
    scales, zeros = find_grids(columns, bits, symmetric, importance)
    codes = quantize(columns, scales[:, None], zeros[:, None], bits).astype(jnp.uint8)
    return QuantizedMatrix(codes.reshape(inputs, outputs).T, scales.T, zeros.T.astype(jnp.uint8))
