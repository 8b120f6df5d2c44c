"""The walk over columns that GPTQ and SparseGPT share: change one, spread its error over the rest.

With U the upper Cholesky factor of H^-1 (hessian.py), the optimal brain surgeon update after column
i moved from w_i to q_i is W[:, j] -= e_i U[i, j] for j > i, with e_i = (w_i - q_i) / U[i, i]. So
with E = [e_0 .. e_i] the current weights are W - E U[:i + 1, :]. Where the papers push an error
forward to all later columns, here a column asks for what it has missed when it is reached: a tile
by one product with all earlier errors, a segment with those of its tile, a column with those of its
segment. Nothing but E is written on the way.

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
    pivots = jnp.diagonal(block)

    def visit_segment(errors: jax.Array, first: jax.Array) -> tuple[jax.Array, Any]:
        columns = jax.lax.dynamic_slice_in_dim(rows, first, segment)
        reach = jax.lax.dynamic_slice_in_dim(block, first, segment, axis=1)
        columns = columns - jnp.matmul(reach.T, errors, precision=_HIGHEST)
        corner = jax.lax.dynamic_slice_in_dim(reach, first, segment)
        decision = plan(
            columns, jax.lax.dynamic_slice_in_dim(pivots, first, segment), start + first
        )

        def visit_column(errors: jax.Array, column) -> tuple[jax.Array, Any]:
            column, reach, pivot, place = column
            column = column - jnp.matmul(reach, errors, precision=_HIGHEST)
            new, record = change(column, place, decision)
            error = (column - new) / pivot
            errors = jax.lax.dynamic_update_index_in_dim(errors, error, place, axis=0)
            return errors, (new, record)

        places = jnp.arange(segment, dtype=jnp.int32)
        pivots_of_segment = jnp.diagonal(corner)
        mine, visited = jax.lax.scan(
            visit_column, jnp.zeros_like(columns), (columns, corner.T, pivots_of_segment, places)
        )
        errors = jax.lax.dynamic_update_slice_in_dim(errors, mine, first, axis=0)
        return errors, (*visited, decision)

    firsts = jnp.arange(rows.shape[0] // segment, dtype=jnp.int32) * segment
    errors, (new, records, decisions) = jax.lax.scan(visit_segment, jnp.zeros_like(rows), firsts)
    return new, errors, records, decisions


def _pad(columns: jax.Array, factor: jax.Array, extra: int) -> tuple[jax.Array, jax.Array]:
    """Appends zero columns that are coupled to nothing."""
    if extra == 0:
        return columns, factor
    pivots = jnp.concatenate(
        [jnp.zeros(factor.shape[0], jnp.float32), jnp.ones(extra, jnp.float32)]
    )
    columns = jnp.pad(columns, ((0, extra), (0, 0)))
    return columns, jnp.pad(factor, ((0, extra), (0, extra))) + jnp.diag(pivots)
