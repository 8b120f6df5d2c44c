"""The matrix that turns hidden states into logits, apart from the model that it belongs to."""

import jax
import jax.numpy as jnp
from flax import struct

from idp_jax.sharding import constrain


class Head(struct.PyTreeNode):
    """Called with hidden states [..., E], it gives float32 logits [..., V].

    Attributes:
        kernel: [E, V]; or [V, E] where it is the embedding of a tied model.
        turned: whether it is [V, E] (static).
    """

    kernel: jax.Array
    turned: bool = struct.field(pytree_node=False)

    def whole(self) -> "Head":
        """The same on a mesh with what cuts it to be stored undone: once for many products."""
        names = ("vocab", "embed_activation")
        return self.replace(kernel=constrain(self.kernel, *(names if self.turned else names[::-1])))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        contract = 1 if self.turned else 0
        dims = (((hidden.ndim - 1,), (contract,)), ((), ()))
        with jax.named_scope("head"):
            logits = jax.lax.dot_general(
                hidden,
                self.kernel.astype(hidden.dtype),
                dims,
                preferred_element_type=jnp.float32,
            )
        names = ("batch",) + ("time",) * (logits.ndim - 2) + ("vocab",)
        return constrain(logits, *names)
