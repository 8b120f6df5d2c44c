"""Wanda (Sun et al. 2023, arXiv 2306.11695): drop the weights that move the output least.

The others stay as they are. The score of a weight is |w_ij| times the root mean square of input j.
The invariant: weights are compared within their row (within their run, for n:m), never between
outputs.
"""

import functools

import jax
import jax.numpy as jnp

from idp_jax.compression.cores.masks import check_target, pattern_mask, pruned_count, smallest


@functools.partial(jax.jit, static_argnames=("sparsity", "pattern"))
def wanda(
    weights: jax.Array,
    hessian: jax.Array,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Prunes a matrix by the size of its weights times that of their inputs.

    Args:
      weights: float32 [O, I].
      hessian: float32 [I, I] of the layer's inputs (see `hessian.accumulate`); only its diagonal
        is read.
      sparsity: fraction of every row to prune, in [0, 1): exactly floor(sparsity * I) weights.
      pattern: (n, m), instead: n zeros in every run of m inputs, such as (2, 4).

    Returns:
      The pruned weights [O, I], and the mask bool [O, I], True where pruned.

    Raises:
      ValueError: unless exactly one of sparsity and pattern is given, in range and fitting the
        inputs.
    """
    inputs = weights.shape[1]
    check_target(inputs, sparsity, pattern)
    scores = jnp.abs(weights) * jnp.sqrt(jnp.diagonal(hessian))
    if pattern is None:
        count = pruned_count(sparsity, inputs)
        mask = jax.vmap(lambda row: smallest(row, count))(scores)
    else:
        mask = pattern_mask(scores, pattern)
    return jnp.where(mask, 0.0, weights), mask
