"""A plain matrix, and what every kind of weight multiplies by."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Array = jax.Array | np.ndarray  # a model read from disk holds numpy arrays until it is placed


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] @ kernel [..., I, O] in the dtype of x, summed in float32."""
    y = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def add_bias(y: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """y [..., O] with its bias [..., O], if there is one, in the dtype of y."""
    return y if bias is None else y + bias[...].astype(y.dtype)


class Dense(nnx.Module):
    """A plain matrix, pruned ones included (their zeros are stored).

    Attributes:
        kernel: [..., I, O] floating point.
        bias: [..., O] or None.
    """

    def __init__(self, kernel: Array, bias: Array | None = None):
        self.kernel = nnx.Param(kernel)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiplies x [..., I]: [..., O] in the dtype of x, summed in float32."""
        return add_bias(product(x, self.kernel[...]), self.bias)

    def dense(self, dtype=jnp.float32) -> jax.Array:
        """The matrix [..., I, O]."""
        return self.kernel[...].astype(dtype)

    def logical_axes(self, inputs: str | None, outputs: str | None) -> dict[str, Any]:
        """What the axes of the parameters mean, see `sharding.declared_axes`."""
        return {"kernel": (inputs, outputs), "bias": (outputs,)}

    order = None  # of the inputs, where it is not their own

    def without_bias(self) -> "Dense":
        """The same matrix alone."""
        return Dense(self.kernel[...])

    def in_order(self, x: jax.Array) -> tuple[jax.Array, "Dense"]:
        """The inputs as the matrix has them, and the matrix for them: both as they are."""
        return x, self

    def divides(self, split: str, parts: int) -> bool:
        """Whether its "inputs" or "outputs" can be cut into so many parts."""
        return self.kernel[...].shape[-2 if split == "inputs" else -1] % parts == 0

    def part(self, split: str, parts: int) -> "Dense":
        """The weight whose arrays will be one of so many parts."""
        return self
