"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): later columns make up for the rounding of earlier.

Minimises tr((W - Q) H (W - Q)^T) over Q on the grid, greedily: columns are visited in order; column
i is rounded to its grid, its error spread over the columns to come by the optimal brain surgeon
update (sweep.py). The order is the same for all rows, so that one factor U of H^-1 serves them all.
With a mask as in SparseGPT, zeros and fewer bits are made in one pass.

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
from typing import NamedTuple

import jax
import jax.numpy as jnp

from idp_jax.compression.cores.grid import (
    QuantizedMatrix,
    dequantize,
    find_grid,
    find_grids,
    quantize,
    resolve_group_size,
)
from idp_jax.compression.cores.hessian import Diagnostics, inverse_factor, relative_output_error
from idp_jax.compression.cores.masks import check_target, pruned_count, smallest, smallest_of_run
from idp_jax.compression.cores.order import column_order
from idp_jax.compression.cores.sweep import sweep

_Levels = tuple[jax.Array, jax.Array]  # scales and zeros
# (columns [segment, O], pivots, index of the first) -> True where a weight becomes 0.
_MaskOf = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
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
    group, whole = resolve_group_size(W.shape[1], group_size), group_size == -1
    if sparsity is not None or pattern is not None:
        check_target(group, sparsity, pattern)
    run = 1 if pattern is None else pattern[1]
    tiling = _tiling(W.shape[1], group, whole, block_size, run)
    order = column_order(jnp.diagonal(H), act_order, group, run)
    U, dead, damping_used, retries = inverse_factor(H, damping, order)
    columns = jnp.where(dead, 0.0, W[:, order]).T
    importance = jnp.diagonal(H) if grid == "mse" else None
    make_grids = _fixed_grids if whole or act_order == "static" else _running_grids
    grids = make_grids(columns, order, importance, tiling, bits, symmetric)
    mask_of = _masker(W.shape, tiling.segment, sparsity, pattern)
    matrix, Q = _walk(columns, U, order, tiling, grids, mask_of, bits)
    error = relative_output_error(W, Q, H)
    diagnostics = Diagnostics(damping_used, retries, jnp.sum(dead, dtype=jnp.int32), error)
    return matrix, Q, diagnostics


class _Tiling(NamedTuple):
    """Columns of a group, of one decision (segment), and between lazy updates (tile).

    The segment divides the tile, and the runs of a pattern divide the segment.
    """

    group: int
    segment: int
    tile: int


class _Grids(NamedTuple):
    """How columns come by their grids.

    Attributes:
      choose: (a segment's weights with their zeros [segment, O], index of the first column) ->
        the segment's levels.
      take: (a segment's levels, place of a column) -> the column's scale and zero [O].
      stored: (the levels of all segments) -> scales and zeros [G, O], groups as they lie.
    """

    choose: Callable[[jax.Array, jax.Array], _Levels]
    take: Callable[[_Levels, jax.Array], _Levels]
    stored: Callable[[_Levels], _Levels]


def _fixed_grids(
    columns: jax.Array,
    order: jax.Array,
    importance: jax.Array | None,
    tiling: _Tiling,
    bits: int,
    symmetric: bool,
) -> _Grids:
    """Grids of the original weights, their groups as they lie."""
    groups = columns[jnp.argsort(order)].reshape(-1, tiling.group, columns.shape[1])
    costs = None if importance is None else importance.reshape(-1, tiling.group)
    fixed = find_grids(groups, bits, symmetric, costs)
    group_of = jnp.pad(order // tiling.group, (0, -order.size % tiling.tile))

    def choose(_: jax.Array, first: jax.Array) -> _Levels:
        groups = jax.lax.dynamic_slice_in_dim(group_of, first, tiling.segment)
        return fixed[0][groups], fixed[1][groups]

    take = lambda levels, place: (levels[0][place], levels[1][place])
    return _Grids(choose, take, lambda levels: fixed)


def _running_grids(
    columns: jax.Array,
    order: jax.Array,
    importance: jax.Array | None,
    tiling: _Tiling,
    bits: int,
    symmetric: bool,
) -> _Grids:
    """A grid for every group, of its weights as they are when its first column is reached."""
    if importance is not None:
        # Columns that fill up the last tile count for nothing.
        importance = jnp.pad(importance[order], (0, -order.size % tiling.tile))

    def choose(kept: jax.Array, first: jax.Array) -> _Levels:
        if importance is None:
            return find_grid(kept.T, bits, symmetric)
        weighing = jax.lax.dynamic_slice_in_dim(importance, first, tiling.segment)
        return find_grid(kept.T, bits, symmetric, weighing)

    def stored(levels: _Levels) -> _Levels:
        # One grid a segment, in the order of the visits.
        visited = jnp.argsort(order)[:: tiling.group] // tiling.group
        return levels[0][visited], levels[1][visited]

    return _Grids(choose, lambda levels, place: levels, stored)


def _walk(
    columns: jax.Array,
    factor: jax.Array,
    order: jax.Array,
    tiling: _Tiling,
    grids: _Grids,
    mask_of: _MaskOf | None,
    bits: int,
) -> tuple[QuantizedMatrix, jax.Array]:
    """Rounds the columns in their order: the matrix and its weights [O, I], columns as they lie."""

    def plan(columns: jax.Array, pivots: jax.Array, first: jax.Array):
        masked = None if mask_of is None else mask_of(columns, pivots, first)
        kept = columns if masked is None else jnp.where(masked, 0.0, columns)
        return grids.choose(kept, first), masked

    def change(column: jax.Array, place: jax.Array, decision):
        levels, masked = decision
        scale, zero = grids.take(levels, place)
        code = quantize(column, scale, zero, bits)
        if masked is not None:
            code = jnp.where(masked[place], zero, code)
        return dequantize(code, scale, zero), code.astype(jnp.uint8)

    Q, codes, (levels, _) = sweep(
        columns, factor, tile=tiling.tile, segment=tiling.segment, plan=plan, change=change
    )
    back = jnp.argsort(order)
    scales, zeros = grids.stored(levels)
    return QuantizedMatrix(codes[back].T, scales.T, zeros.T.astype(jnp.uint8)), Q[back].T


def _masker(
    shape: tuple[int, ...],
    segment: int,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
) -> _MaskOf | None:
    """What chooses the zeros of a matrix [O, I]; None where there are none to be."""
    if sparsity is None and pattern is None:
        return None
    outputs, inputs = shape

    def mask_of(columns: jax.Array, pivots: jax.Array, first: jax.Array) -> jax.Array:
        scores = jnp.square(columns / pivots[:, None])
        if pattern is not None:
            runs = scores.reshape(-1, pattern[1], outputs)
            masked = jax.vmap(lambda run: smallest_of_run(run, pattern[0]))(runs)
            return masked.reshape(columns.shape)
        # Columns that fill up the last tile are never chosen.
        real = first + jnp.arange(segment) < inputs
        scores = jnp.where(real[:, None], scores, jnp.inf)
        last = pruned_count(sparsity, (inputs % segment or segment) * outputs)
        count = jnp.where(first + segment > inputs, last, pruned_count(sparsity, columns.size))
        return smallest(scores, count)

    return mask_of


def _tiling(inputs: int, group: int, whole_row: bool, block_size: int, run: int) -> _Tiling:
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}: 128 is usual")
    if whole_row:
        tile = max(min(block_size, inputs) // run, 1) * run
        return _Tiling(group, tile, tile)
    return _Tiling(group, group, max(block_size // group, 1) * group)
