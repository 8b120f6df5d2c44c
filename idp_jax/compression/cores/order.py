"""The orders in which GPTQ may visit columns, most important first.

The importance of a column is its diagonal entry of the Hessian: the mean square of its input. The
invariant: an order is undone after the walk, so a checkpoint never shows it; therefore the columns
of a group need either stay together ("group") or have grids that are known before ("static").
"""

import jax
import jax.numpy as jnp

ACT_ORDERS = ("none", "static", "group")


def column_order(importance: jax.Array, act_order: str, group: int, run: int = 1) -> jax.Array:
    """The columns in the order of their visits.

    Args:
      importance: float32 [I], the diagonal of the Hessian.
      act_order: "none": as they lie; "static": by importance; "group": groups by their most
        important column, and columns by importance within their group.
      group: columns of a group.
      run: columns that stay together as they lie, for the patterns of n:m sparsity.

    Returns:
      int32 [I], a permutation; equal columns keep their order.

    Raises:
      ValueError: for another order.
    """
    if act_order not in ACT_ORDERS:
        raise ValueError(f"act_order must be one of {', '.join(ACT_ORDERS)}, not {act_order!r}")
    index = jnp.arange(importance.shape[0], dtype=jnp.int32)
    if act_order == "none":
        return index
    if act_order == "static":
        group = importance.shape[0]
    runs = importance.reshape(-1, group // run, run).max(2)  # [G, runs of a group]
    within = jnp.argsort(-runs, axis=1, stable=True)
    groups = jnp.argsort(-runs.max(1), stable=True)
    index = index.reshape(-1, group // run, run)
    return jnp.take_along_axis(index, within[:, :, None], 1)[groups].reshape(-1)
