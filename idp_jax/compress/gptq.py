"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): quantise column by column, later columns make up
for the rounding of earlier ones; with a mask as in SparseGPT, zeros and fewer bits in one pass.

Minimises tr((W - Q) H (W - Q)^T) over Q on the grid, greedily: columns are visited in order; column
i is rounded to its grid, its error spread over the columns to come by the optimal brain surgeon
update (sweep.py). The order is the same for all rows, so that one factor U of H^-1 serves them all.

A mask is chosen by what a zero costs once the later columns have made up for it, w^2 / U_ii^2. The
search for a grid weighs errors by H_ii instead, what they cost before that: the error comes out a
little larger and the model better (SmolLM2, 3 bits in groups of 64: perplexity 49.1, not 55.2).

Columns with large inputs should come first, while others are left to make up for them. `order.py`
gives orders that leave groups where they lie on disk, so that nothing is gathered at inference.

Invariant: the grid of a group comes from the weights as updated when its first column is reached,
whatever the block size (the public implementation misses the updates of the running block, for
groups smaller than a block); the grid of a whole row, and static grids, come from the original
weights.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from idp_jax.compress.grid import (
    QuantizedMatrix,
    dequantize,
    find_grid,
    find_grids,
    quantize,
    resolve_group_size,
)
from idp_jax.compress.hessian import Diagnostics, inverse_factor, relative_output_error
from idp_jax.compress.masks import check_target, pruned_count, smallest, smallest_of_run
from idp_jax.compress.order import column_order
from idp_jax.compress.sweep import sweep

_STATIC = (
    "bits",
    "group_size",
    "symmetric",
    "grid",
    "act_order",
    "sparsity",
    "pattern",
    "block_size",
)


@functools.partial(jax.jit, static_argnames=_STATIC)
def gptq(
    weights: jax.Array,
    hessian: jax.Array,
    *,
    bits: int,
    group_size: int = -1,
    symmetric: bool = False,
    grid: str = "minmax",
    act_order: str = "none",
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
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
      grid: "minmax", or "mse" for the range that costs least (see `find_grid`).
      act_order: "none", "static" or "group" (see `order.column_order`).
      sparsity: also set this fraction of every group's weights (of `block_size` columns, with
        whole rows) to exactly 0.
      pattern: (n, m), instead: n zeros in every run of m inputs, such as (2, 4).
      damping: added to the Hessian's diagonal, as a fraction of its mean.
      block_size: columns between two lazy updates; fitted to the group size. It costs or saves time
        and changes nothing else.

    Returns:
      The matrix on its grid, the weights it stands for (float32 [O, I]), and what happened on the
      way. A zero is stored as the code of its group's zero point.

    Raises:
      ValueError: for another number of bits, a group size that does not divide I, a sparsity or
        pattern out of range, or a block size below 1.
    """
    W, H = weights, hessian
    inputs = W.shape[1]
    group, whole = resolve_group_size(inputs, group_size), group_size == -1
    sparse = sparsity is not None or pattern is not None
    if sparse:
        check_target(group, sparsity, pattern)
    run = 1 if pattern is None else pattern[1]
    order = column_order(jnp.diagonal(H), act_order, group, run)
    back = jnp.argsort(order)
    segment, tile = _tiling(inputs, group, whole, block_size, run)
    U, dead, damping_used, retries = inverse_factor(H, damping, order)
    columns = jnp.where(dead, 0.0, W[:, order]).T
    search = grid == "mse"
    static = whole or act_order == "static"
    # The grids of the original weights, their groups as they lie: [G, O].
    importance = jnp.diagonal(H)
    fixed = find_grids(
        columns[back].reshape(-1, group, W.shape[0]),
        bits,
        symmetric,
        importance.reshape(-1, group) if search else None,
    )
    # Columns that fill up the last tile count for nothing.
    importance = jnp.pad(importance[order], (0, -inputs % tile))
    group_of = jnp.pad(order // group, (0, -inputs % tile))
    mask_of = _masker(W.shape[0], inputs, segment, sparsity, pattern) if sparse else None

    def plan(own: jax.Array, pivots: jax.Array, first: jax.Array):
        masked = None if mask_of is None else mask_of(own, pivots, first)
        if static:
            groups = jax.lax.dynamic_slice_in_dim(group_of, first, segment)
            return tuple(values[groups] for values in fixed), masked
        kept = own if masked is None else jnp.where(masked, 0.0, own)
        weighed = jax.lax.dynamic_slice_in_dim(importance, first, segment) if search else None
        return find_grid(kept.T, bits, symmetric, weighed), masked

    def change(column: jax.Array, place: jax.Array, decision):
        levels, masked = decision
        scale, zero = (values[place] if static else values for values in levels)
        code = quantize(column, scale, zero, bits)
        if masked is not None:
            code = jnp.where(masked[place], zero, code)
        return dequantize(code, scale, zero), code.astype(jnp.uint8)

    Q, codes, (found, _) = sweep(columns, U, tile=tile, segment=segment, plan=plan, change=change)
    if not static:
        # One grid a segment, in the order of the visits.
        fixed = tuple(values[back[::group] // group] for values in found)
    scales, zeros = fixed
    matrix = QuantizedMatrix(codes[back].T, scales.T, zeros.T.astype(jnp.uint8))
    Q = Q[back].T
    error = relative_output_error(W, Q, H)
    diagnostics = Diagnostics(damping_used, retries, jnp.sum(dead, dtype=jnp.int32), error)
    return matrix, Q, diagnostics


def _masker(
    outputs: int,
    inputs: int,
    segment: int,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """(columns [segment, O], pivots, index of the first) -> True where a weight becomes 0."""

    def mask_of(own: jax.Array, pivots: jax.Array, first: jax.Array) -> jax.Array:
        scores = jnp.square(own / pivots[:, None])
        if pattern is not None:
            runs = scores.reshape(-1, pattern[1], outputs)
            masked = jax.vmap(lambda run: smallest_of_run(run, pattern[0]))(runs)
            return masked.reshape(own.shape)
        # Columns that fill up the last tile are never chosen.
        real = first + jnp.arange(segment) < inputs
        scores = jnp.where(real[:, None], scores, jnp.inf)
        last = pruned_count(sparsity, (inputs % segment or segment) * outputs)
        count = jnp.where(first + segment > inputs, last, pruned_count(sparsity, own.size))
        return smallest(scores, count)

    return mask_of


def _tiling(inputs: int, group: int, whole_row: bool, block_size: int, run: int) -> tuple[int, int]:
    """Segment (columns of one decision) and tile (columns between lazy updates), the segment
    dividing the tile and the runs of a pattern dividing the segment.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}: 128 is usual")
    if whole_row:
        tile = max(min(block_size, inputs) // run, 1) * run
        return tile, tile
    return group, max(block_size // group, 1) * group
