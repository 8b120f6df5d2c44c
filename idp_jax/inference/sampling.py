"""How the next token is picked from logits: the likeliest, or one drawn by chance.

What may be drawn is what transformers' warpers leave: temperature first, then the k likeliest, then
of those the fewest that have the probability p together.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


class Pick(struct.PyTreeNode):
    """Picks one token a row.

    Attributes:
        temperature: what logits are divided by, float32; None takes the likeliest token.
        top_p: float32, or None for no limit.
        top_k: among how many tokens (static); None for all.
    """

    temperature: np.float32 | None
    top_p: np.float32 | None = None
    top_k: int | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def of(
        cls, vocabulary: int, temperature: float, top_k: int | None, top_p: float | None
    ) -> "Pick":
        """Of settings as `generate` takes them.

        Raises:
            ValueError: one is out of range.
        """
        if not 0 <= temperature < np.inf:
            raise ValueError(f"temperature must be 0 or more, got {temperature}")
        if top_k is not None and not 1 <= top_k <= vocabulary:
            raise ValueError(
                f"top_k must be between 1 and the vocabulary of {vocabulary}, got {top_k}"
            )
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        if temperature == 0:
            return cls(None)
        limit = None if top_p in (None, 1) else np.float32(top_p)
        return cls(np.float32(temperature), limit, top_k)

    def __call__(
        self, logits: jax.Array, draw: Callable[[jax.Array], jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """The next tokens (traceable).

        A NaN counts as the largest number, so that it is picked; it is enough to look at that one.

        Args:
            logits: float32 [B, V].
            draw: of logits [B, N] a place in every row by chance, int [B].

        Returns:
            int32 [B], and whether the logits that they were picked by are finite, bool [B].
        """
        if self.temperature is None:
            chosen = logits.argmax(-1)
        elif self.top_k is None and self.top_p is None:
            chosen = draw(logits / self.temperature)
        else:
            values, index = jax.lax.top_k(logits, self.top_k or logits.shape[-1])
            place = draw(self._likeliest(values / self.temperature))
            chosen = jnp.take_along_axis(index, place[:, None], -1)[:, 0]
        found = jnp.take_along_axis(logits, chosen[:, None], -1)[:, 0]
        return chosen.astype(jnp.int32), jnp.isfinite(found)

    def _likeliest(self, logits: jax.Array) -> jax.Array:
        """Falling logits [B, N], -inf behind those that reach `top_p`."""
        if self.top_p is None:
            return logits
        share = jax.nn.softmax(logits, -1)
        before = jnp.cumsum(share, -1) - share
        # The first stands whatever p is, and so does what is not a number, which is found out.
        first = jnp.arange(logits.shape[-1]) == 0
        return jnp.where(first | (before < self.top_p), logits, -jnp.inf)
