"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): quantise column by column, later columns make up
for the rounding of earlier ones.

Minimises tr((W - Q) H (W - Q)^T) over Q on the grid, greedily: columns are visited in order; column
i is rounded to its grid, its error spread over the columns to come by the optimal brain surgeon
update (sweep.py). The order is the same for all rows, so that one factor U of H^-1 serves them all.

Invariant: the grid of a group comes from the weights as updated when its first column is reached,
whatever the block size (the public implementation misses the updates of the running block, for
groups smaller than a block); the grid of a whole row comes from the original weights.
"""

import functools

import jax
import jax.numpy as jnp

from idp_jax.compress.grid import (
    QuantizedMatrix,
    dequantize,
    find_grid,
    quantize,
    resolve_group_size,
)
from idp_jax.compress.hessian import Diagnostics, inverse_factor, relative_output_error
from idp_jax.compress.sweep import sweep


@functools.partial(jax.jit, static_argnames=("bits", "group_size", "symmetric", "block_size"))
def gptq(
    weights: jax.Array,
    hessian: jax.Array,
    *,
    bits: int,
    group_size: int = -1,
    symmetric: bool = False,
    damping: float | jax.Array = 0.01,
    block_size: int = 128,
) -> tuple[QuantizedMatrix, jax.Array, Diagnostics]:
    """Quantises a matrix with second-order error compensation.

    Args:
      weights: float32 [O, I].
      hessian: float32 [I, I] of the layer's inputs (see `hessian.accumulate`).
      bits: 2, 3, 4 or 8.
      group_size: columns that share a scale and zero; -1 for the whole row.
      symmetric: whether the grid is symmetric about 0 (see `find_grid`).
      damping: added to the Hessian's diagonal, as a fraction of its mean.
      block_size: columns between two lazy updates; fitted to the group size. It costs or saves time
        and changes nothing else.

    Returns:
      The matrix on its grid, the weights it stands for (float32 [O, I]), and what happened on the
      way.

    Raises:
      ValueError: for another number of bits, a group size that does not divide I, or a block size
        below 1.
    """
    W, H = weights, hessian
    inputs = W.shape[1]
    group = resolve_group_size(inputs, group_size)
    segment, tile = _tiling(inputs, group, group_size == -1, block_size)
    U, dead, damping_used, retries = inverse_factor(H, damping)
    row_grid = find_grid(jnp.where(dead, 0.0, W), bits, symmetric)

    def plan(
        columns: jax.Array, pivots: jax.Array, first: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        del pivots, first
        return row_grid if group_size == -1 else find_grid(columns.T, bits, symmetric)

    def change(
        column: jax.Array, place: jax.Array, grid: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        del place
        code = quantize(column, *grid, bits)
        return dequantize(code, *grid), code.astype(jnp.uint8)

    columns = jnp.where(dead[:, None], 0.0, W.T)
    Q, codes, (scales, zeros) = sweep(
        columns, U, tile=tile, segment=segment, plan=plan, change=change
    )
    groups = inputs // group
    matrix = QuantizedMatrix(codes.T, scales[:groups].T, zeros[:groups].T.astype(jnp.uint8))
    error = relative_output_error(W, Q.T, H)
    return matrix, Q.T, Diagnostics(damping_used, retries, jnp.sum(dead, dtype=jnp.int32), error)


def _tiling(inputs: int, group: int, whole_row: bool, block_size: int) -> tuple[int, int]:
    """Segment (columns of one grid decision) and tile (columns between lazy updates), the segment
    dividing the tile.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}: 128 is usual")
    if whole_row:
        tile = min(block_size, inputs)
        return tile, tile
    return group, max(block_size // group, 1) * group
