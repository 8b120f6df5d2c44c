"""Which weights to prune, given their scores: the selection that all pruning methods share.

Invariant: counts are exact. Equal scores are pruned in the order of their index, never all or none.
A mask is True where the weight is pruned.
"""

import math

import jax
import jax.numpy as jnp


def check_target(inputs: int, sparsity: float | None, pattern: tuple[int, int] | None) -> None:
    """Accepts either a sparsity in [0, 1) or a pattern (n, m): n zeros in every run of m inputs.

    Raises:
      ValueError: if both or neither are given, or one is out of range.
    """
    if (sparsity is None) == (pattern is None):
        raise ValueError(
            f"give either sparsity or pattern, not sparsity={sparsity} and pattern={pattern}"
        )
    if pattern is None:
        if sparsity is None or not 0.0 <= sparsity < 1.0:
            raise ValueError(
                f"sparsity {sparsity} is outside [0, 1): give the fraction to prune, such as 0.5"
            )
        return
    zeros, run = pattern
    if not 0 < zeros < run:
        raise ValueError(
            f"pattern {pattern} must be (zeros, run) with 0 < zeros < run, such as (2, 4)"
        )
    if inputs % run:
        raise ValueError(
            f"pattern {pattern}: {inputs} inputs do not divide into runs of {run}, choose a divisor"
        )


@jax.jit
def smallest(scores: jax.Array, count: int | jax.Array) -> jax.Array:
    """Marks the `count` smallest scores of a whole array.

    A selection by bisection over the 32 bits of the threshold: each pass only counts, where a sort
    would move everything.

    Args:
      scores: float32 of any shape with fewer than 2^31 entries, none negative.
      count: how many to mark, 0 .. size.

    Returns:
      bool of the same shape with exactly `count` True; of equal scores those of lowest flat index.
    """
    # Non-negative floats are ordered as their bit patterns; abs turns -0.0 into 0.0.
    keys = jax.lax.bitcast_convert_type(jnp.abs(scores), jnp.uint32)
    count = jnp.asarray(count, jnp.int32)
    threshold = _largest_with_fewer_below(keys, jnp.ones_like(keys, dtype=jnp.bool_), count, 32)
    below, ties = keys < threshold, keys == threshold
    index = jnp.arange(keys.size, dtype=jnp.uint32).reshape(keys.shape)
    missing = count - jnp.sum(below, dtype=jnp.int32)
    last = _largest_with_fewer_below(index, ties, missing, max(keys.size - 1, 1).bit_length())
    return (below | (ties & (index <= last))) & (count > 0)


def _largest_with_fewer_below(
    keys: jax.Array, among: jax.Array, count: jax.Array, bits: int
) -> jax.Array:
    """The count-th smallest of the chosen keys.

    It is the largest number of `bits` bits that has fewer than `count` of them below it.
    """

    def try_bit(step: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.uint32(1) << (jnp.uint32(bits - 1) - step.astype(jnp.uint32)))
        below = jnp.sum((keys < candidate) & among, dtype=jnp.int32)
        return jnp.where(below < count, candidate, found)

    return jax.lax.fori_loop(0, bits, try_bit, jnp.uint32(0))


def smallest_of_run(scores: jax.Array, count: int) -> jax.Array:
    """Marks the `count` smallest of every run.

    Args:
      scores: float32 [m, ...], a run along the first axis.
      count: how many of the m to mark.

    Returns:
      bool [m, ...] with exactly `count` True along the first axis; of equal scores those of lowest
      index.
    """
    index = jnp.arange(scores.shape[0]).reshape(-1, *[1] * (scores.ndim - 1))
    this, other = scores[:, None], scores[None]
    before = (other < this) | ((other == this) & (index[None] < index[:, None]))
    return jnp.sum(before, axis=1, dtype=jnp.int32) < count


def pattern_mask(scores: jax.Array, pattern: tuple[int, int]) -> jax.Array:
    """Marks n of every m neighbouring inputs, those of the smallest scores.

    Args:
      scores: float32 [O, I].
      pattern: (n, m), m dividing I.

    Returns:
      bool [O, I].
    """
    zeros, run = pattern
    runs = jnp.moveaxis(scores.reshape(scores.shape[0], -1, run), -1, 0)
    return jnp.moveaxis(smallest_of_run(runs, zeros), 0, -1).reshape(scores.shape)


def pruned_count(sparsity: float | None, size: int) -> int:
    """Weights to prune out of `size`: sparsity times size, rounded down; None counts as 0."""
    return math.floor((sparsity or 0.0) * size)
