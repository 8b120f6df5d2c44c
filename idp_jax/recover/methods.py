"""What is known of every repair."""

import jax
import numpy as np
from flax import nnx


def parameter_count(adapter: nnx.Module) -> int:
    """The number of numbers that an adapter adds to the model."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(adapter))
