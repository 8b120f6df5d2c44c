"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): later columns make up for the pruned.

Removing weight w_ij costs w_ij^2 / U_jj^2 in output error, with U the factor of H^-1 (hessian.py):
that is its score. The mask is chosen from the updated weights, per block of columns (unstructured,
one threshold over the whole block) or per run of m (n:m); then the columns are swept as in GPTQ,
with "set to 0 where masked" in place of rounding.

Invariant: weights are zero where the mask says and, but for zeros already there, nowhere else. A
dead column's weights score 0: they are pruned first, and those that stay are left alone (the public
implementation sets them all to 0).
"""

import functools

import jax
import jax.numpy as jnp

from idp_jax.compression.cores.hessian import Diagnostics, inverse_factor, relative_output_error
from idp_jax.compression.cores.masks import check_target, pruned_count, smallest, smallest_of_run
from idp_jax.compression.cores.sweep import sweep


@functools.partial(jax.jit, static_argnames=("sparsity", "pattern", "block_size"))
def sparsegpt(
    weights: jax.Array,
    hessian: jax.Array,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    damping: float | jax.Array = 0.01,
    block_size: int = 128,
) -> tuple[jax.Array, jax.Array, Diagnostics]:
    """Prunes a matrix with second-order error compensation.

    Args:
      weights: float32 [O, I].
      hessian: float32 [I, I] of the layer's inputs (see `hessian.accumulate`).
      sparsity: fraction to prune, in [0, 1): floor(sparsity * O * block) weights of every block of
        columns.
      pattern: (n, m), instead: n zeros in every run of m inputs, such as (2, 4).
      damping: added to the Hessian's diagonal, as a fraction of its mean.
      block_size: columns that share a threshold; with a pattern only a matter of speed.

    Returns:
      The pruned weights [O, I], the mask bool [O, I] (True where pruned), and what happened on the
      way.

    Raises:
      ValueError: unless exactly one of sparsity and pattern is given, in range and fitting the
        inputs; for a block size below 1.
    """
    W, H = weights, hessian
    outputs, inputs = W.shape
    check_target(inputs, sparsity, pattern)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}: 128 is usual")
    U, dead, damping_used, retries = inverse_factor(H, damping)
    run = min(block_size, inputs) if pattern is None else pattern[1]
    tile = max(block_size // run, 1) * run
    # 1 takes the score as computed; dead columns go first, those that fill the last tile never.
    padding = -inputs % tile
    worth = jnp.pad(jnp.where(dead, 0.0, 1.0), (0, padding), constant_values=jnp.inf)
    widths = [min(run, inputs - first) for first in range(0, inputs, run)]
    counts = [pruned_count(sparsity, outputs * width) for width in widths]
    counts = jnp.asarray(counts, jnp.int32)

    def plan(columns: jax.Array, pivots: jax.Array, first: jax.Array) -> jax.Array:
        fixed = jax.lax.dynamic_slice_in_dim(worth, first, run)[:, None]
        scores = jnp.where(fixed == 1.0, jnp.square(columns / pivots[:, None]), fixed)
        if pattern is None:
            return smallest(scores, counts[first // run])
        return smallest_of_run(scores, pattern[0])

    def change(column: jax.Array, place: jax.Array, mask: jax.Array) -> tuple[jax.Array, tuple[()]]:
        return jnp.where(mask[place], 0.0, column), ()

    pruned, _, masks = sweep(W.T, U, tile=tile, segment=run, plan=plan, change=change)
    mask = masks.reshape(-1, outputs)[:inputs].T
    error = relative_output_error(W, pruned.T, H)
    return pruned.T, mask, Diagnostics(damping_used, retries, jnp.sum(dead, dtype=jnp.int32), error)
