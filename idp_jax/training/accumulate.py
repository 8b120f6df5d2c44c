"""A step's batch in several passes through the model, one after the other, for less memory.

The invariant: value, metrics and gradient are those of one pass, but for the order of sums, for
every objective that is a mean over the positions that count. (CKA, and the load balance of a pool
that is trained jointly, are made for each pass.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from idp_jax.data.batch import Batch
from idp_jax.training.objectives import counted_targets


def in_passes(slope: Callable, batch: Batch, passes: int) -> Any:
    """What `slope` gives for a batch, the mean over its passes.

    Args:
        slope: (batch, number of the pass, int32) -> pytree of floating-point arrays.
        batch: whose rows divide into so many passes.
    """
    if passes == 1:
        return slope(batch, jnp.int32(0))
    word = batch.teacher
    head = None if word is None else word.head
    if word is not None:
        batch = batch._replace(teacher=word.replace(head=None))
    # Every pass takes rows of each device's own: neighbours of a row go to different passes.
    split = lambda x: jnp.moveaxis(x.reshape(-1, passes, *x.shape[1:]), 1, 0)
    parts = jax.tree.map(split, batch)

    def of_pass(part: Batch, number: jax.Array) -> Any:
        if word is not None:
            part = part._replace(teacher=part.teacher.replace(head=head))
        found = slope(part, number)
        count = counted_targets(part).sum(dtype=jnp.float32)
        return count, jax.tree.map(lambda x: x * count.astype(x.dtype), found)

    def step(total: Any, xs: tuple) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_pass(*xs)), None

    passed = parts, jnp.arange(passes, dtype=jnp.int32)
    shapes = jax.eval_shape(of_pass, *jax.tree.map(lambda x: x[0], passed))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (count, total), _ = jax.lax.scan(step, nothing, passed)
    return jax.tree.map(lambda x: x / jnp.maximum(count, 1).astype(x.dtype), total)
