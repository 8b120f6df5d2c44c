"""The walk over columns that GPTQ and SparseGPT share: change one column, spread its error over the
columns not yet reached.

With U the upper Cholesky factor of H^-1 (hessian.py), the optimal brain surgeon update after column
i moved from w_i to q_i is W[:, j] -= e_i U[i, j] for j > i, with e_i = (w_i - q_i) / U[i, i]. So
with E = [e_0 .. e_i] the current weights are W - E U[:i + 1, :]: a tile of columns is brought up to
date by one product when it is reached (the papers push the same sum forward after every block), and
only inside the tile is the update done column by column.

Invariant: arrays are transposed, [I, O], so that a column of W is one contiguous row; the size of a
tile changes the result by rounding alone, unless the plan itself looks at a whole tile.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST

# (columns [segment, O], pivots U_ii [segment], index of the first column) -> a pytree, the decision
# for the segment.
Plan = Callable[[jax.Array, jax.Array, jax.Array], Any]
# (column [O], its place in the segment, the segment's decision) -> (new column [O], a record to
# keep).
Change = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def sweep(
    columns: jax.Array, factor: jax.Array, *, tile: int, segment: int, plan: Plan, change: Change
) -> tuple[jax.Array, Any, Any]:
    """Changes every column in turn and lets the later ones make up for the error.

    Args:
      columns: the transposed weights, float32 [I, O].
      factor: upper triangular U [I, I] with H^-1 = U^T U.
      tile: columns brought up to date together; if it does not divide I, zero columns are added at
        the end and handed to `plan` and `change` like the others, but not returned.
      segment: columns for which `plan` decides together, from their updated values; divides `tile`.
      plan: makes the decision for a segment when its first column is reached.
      change: makes the new column.

    Returns:
      The new columns [I, O], the records of `change` stacked [I, ...], the decisions of `plan`
      stacked [ceil(I / segment), ...].
    """
    inputs = columns.shape[0]
    columns, factor = _pad(columns, factor, -inputs % tile)
    padded, outputs = columns.shape

    def visit_tile(errors: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
        rows = jax.lax.dynamic_slice_in_dim(columns, start, tile)
        reach = jax.lax.dynamic_slice_in_dim(factor, start, tile, axis=1)
        # Errors of columns not yet visited are still 0, so the full product is the sum over the
        # visited ones.
        rows = rows - jnp.matmul(reach.T, errors, precision=_HIGHEST)
        block = jax.lax.dynamic_slice_in_dim(reach, start, tile)
        new, tile_errors, records, decisions = _visit_segments(
            rows, block, start, segment, plan, change
        )
        errors = jax.lax.dynamic_update_slice_in_dim(errors, tile_errors, start, axis=0)
        return errors, (new, records, decisions)

    starts = jnp.arange(padded // tile, dtype=jnp.int32) * tile
    errors = jnp.zeros((padded, outputs), jnp.float32)
    _, (new, records, decisions) = jax.lax.scan(visit_tile, errors, starts)
    new, records = jax.tree.map(lambda a: a.reshape(padded, *a.shape[3:])[:inputs], (new, records))
    segments = -(-inputs // segment)
    decisions = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:segments], decisions)
    return new, records, decisions


def _visit_segments(
    rows: jax.Array, block: jax.Array, start: jax.Array, segment: int, plan: Plan, change: Change
) -> tuple[jax.Array, jax.Array, Any, Any]:
    """Sweeps one tile: rows [tile, O] with the tile's part of U [tile, tile]."""
    tile, outputs = rows.shape
    pivots = jnp.diagonal(block)

    def visit_segment(rows: jax.Array, first: jax.Array) -> tuple[jax.Array, Any]:
        own = jax.lax.dynamic_slice_in_dim(rows, first, segment)
        decision = plan(own, jax.lax.dynamic_slice_in_dim(pivots, first, segment), start + first)

        def visit_column(rows: jax.Array, place: jax.Array) -> tuple[jax.Array, Any]:
            index = first + place
            column = jax.lax.dynamic_index_in_dim(rows, index, keepdims=False)
            new, record = change(column, place, decision)
            error = (column - new) / pivots[index]
            # U is upper triangular: rows before this one stay as they are, this one becomes `new`.
            rows = rows - block[index][:, None] * error[None, :]
            return rows, (new, error, record)

        rows, visited = jax.lax.scan(visit_column, rows, jnp.arange(segment, dtype=jnp.int32))
        return rows, (*visited, decision)

    firsts = jnp.arange(tile // segment, dtype=jnp.int32) * segment
    _, (new, errors, records, decisions) = jax.lax.scan(visit_segment, rows, firsts)
    return new, errors.reshape(tile, outputs), records, decisions


def _pad(columns: jax.Array, factor: jax.Array, extra: int) -> tuple[jax.Array, jax.Array]:
    """Appends zero columns that are coupled to nothing."""
    if extra == 0:
        return columns, factor
    pivots = jnp.concatenate(
        [jnp.zeros(factor.shape[0], jnp.float32), jnp.ones(extra, jnp.float32)]
    )
    columns = jnp.pad(columns, ((0, extra), (0, 0)))
    return columns, jnp.pad(factor, ((0, extra), (0, extra))) + jnp.diag(pivots)
