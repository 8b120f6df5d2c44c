"""A frozen weight with a low-rank update beside it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from idp_jax.weights.dense import Dense, add_bias, product
from idp_jax.weights.quantized import Quantized
from idp_jax.weights.repacked import Repacked


class Lora(nnx.Module):
    """A frozen weight with a low-rank update beside it: y = base(x) + scale * (x @ a) @ b.

    Sources: "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1; masked: MaskLoRA of
    "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", arXiv 2312.15230.

    Attributes:
        base: any other kind of weight.
        a: [..., I, r]; b: [..., r, O].
        scale: alpha / r.
        masked: the update is 0 where the frozen weight is. Then the matrix is written out in every
            product, which costs I r O beside the T I O of T tokens.
    """

    def __init__(
        self,
        base: Dense | Quantized | Repacked,
        a: jax.Array,
        b: jax.Array,
        scale: float,
        *,
        masked: bool = False,
    ):
        self.base = base
        self.a = nnx.Param(a)
        self.b = nnx.Param(b)
        self.scale = scale
        self.masked = masked

    @property
    def bias(self) -> nnx.Param | None:
        """The bias of the frozen weight."""
        return self.base.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiplies x [..., I]: [..., O] in the dtype of x."""
        if self.masked:
            return add_bias(product(x, self.dense(x.dtype)), self.bias)
        update = product(product(x, self.a[...]), self.b[...])
        return self.base(x) + update * jnp.asarray(self.scale, x.dtype)

    def dense(self, dtype=jnp.float32) -> jax.Array:
        """The merged matrix [..., I, O]."""
        update = jnp.matmul(self.a[...], self.b[...], precision=jax.lax.Precision.HIGHEST)
        base = self.base.dense(jnp.float32)
        merged = base + update.astype(jnp.float32) * jnp.float32(self.scale)
        return (jnp.where(base == 0, base, merged) if self.masked else merged).astype(dtype)

    def logical_axes(self, inputs: str | None, outputs: str | None) -> dict[str, Any]:
        """What the axes of the parameters mean, see `sharding.declared_axes`."""
        return {
            "base": self.base.logical_axes(inputs, outputs),
            "a": (inputs, "rank"),
            "b": ("rank", outputs),
        }

    def without_bias(self) -> "Lora":
        """The same matrices alone."""
        return self._with(self.base.without_bias())

    def in_order(self, x: jax.Array) -> tuple[jax.Array, "Lora"]:
        """The inputs in the order in which the frozen matrix has them, and all for them."""
        order = self.base.order
        if order is None:
            return x, self
        x, base = self.base.in_order(x)
        return x, Lora(base, self.a[...][order], self.b[...], self.scale, masked=self.masked)

    def divides(self, split: str, parts: int) -> bool:
        """Whether its "inputs" or "outputs" can be cut into so many parts."""
        return self.base.divides(split, parts)

    def part(self, split: str, parts: int) -> "Lora":
        """The weight whose arrays will be one of so many parts."""
        return self._with(self.base.part(split, parts))

    def _with(self, base) -> "Lora":
        return Lora(base, self.a[...], self.b[...], self.scale, masked=self.masked)
