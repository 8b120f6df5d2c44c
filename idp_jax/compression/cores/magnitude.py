"""Magnitude pruning, the baseline of all pruning: drop the smallest weights; no data needed."""

import functools

import jax
import jax.numpy as jnp

from idp_jax.compression.cores.masks import check_target, pattern_mask, pruned_count, smallest


@functools.partial(jax.jit, static_argnames=("sparsity", "pattern"))
def magnitude(
    weights: jax.Array, *, sparsity: float | None = None, pattern: tuple[int, int] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Prunes a matrix by the size of its weights.

    Args:
      weights: float32 [O, I].
      sparsity: fraction of the whole layer to prune, in [0, 1): exactly floor(sparsity * O * I)
        weights.
      pattern: (n, m), instead: the n smallest in every run of m inputs, such as (2, 4).

    Returns:
      The pruned weights [O, I], and the mask bool [O, I], True where pruned.

    Raises:
      ValueError: unless exactly one of sparsity and pattern is given, in range and fitting the
        inputs.
    """
    check_target(weights.shape[1], sparsity, pattern)
    scores = jnp.abs(weights)
    if pattern is None:
        mask = smallest(scores, pruned_count(sparsity, weights.size))
    else:
        mask = pattern_mask(scores, pattern)
    return jnp.where(mask, 0.0, weights), mask
