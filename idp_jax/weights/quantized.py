"""Integer codes packed into words, as GPTQ packs them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from idp_jax.kernels.quant_matmul import xla as quant_matmul
from idp_jax.weights.dense import add_bias


class Quantized(nnx.Module):
    """Integer codes packed into words, in GPTQ's layout.

    The matrix meant is w[i, o] = scales[g(i), o] * (code[i, o] - zeros[g(i), o]).

    Attributes:
        words: int32 [..., I * bits / 32, O]: a little-endian bit stream along the inputs.
        scales: [..., G, O] floating point; group g holds the I / G inputs from g * I / G on,
            unless `group_index` says otherwise.
        zeros: uint8 [..., G, O].
        group_index: int32 [..., I] or None: the group of every input (GPTQ's `g_idx`, for
            act-order).
        bias: [..., O] or None.
        bits: 2, 3, 4 or 8.
    """

    def __init__(self, words, scales, zeros, *, bits: int, group_index=None, bias=None):
        self.words = nnx.Param(words)
        self.scales = nnx.Param(scales)
        self.zeros = nnx.Param(zeros)
        self.group_index = None if group_index is None else nnx.Param(group_index)
        self.bias = None if bias is None else nnx.Param(bias)
        self.bits = bits

    @property
    def inputs(self) -> int:
        """I."""
        return self.words.shape[-2] * 32 // self.bits

    @property
    def outputs(self) -> int:
        """O."""
        return self.words.shape[-1]

    @property
    def groups(self) -> int:
        """G."""
        return self.zeros.shape[-2]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiplies x [..., I]: [..., O] in the dtype of x, summed in float32."""
        group_index = None if self.group_index is None else self.group_index[...]
        y = quant_matmul.quant_matmul(
            x,
            self.words[...],
            self.scales[...],
            self.zeros[...],
            bits=self.bits,
            group_index=group_index,
        )
        return add_bias(y, self.bias)

    def dense(self, dtype=jnp.float32) -> jax.Array:
        """The matrix [..., I, O] that the codes stand for."""

        def one_layer(words, scales, zeros, group_index):
            return quant_matmul.dequantize(
                words, scales, zeros, bits=self.bits, group_index=group_index, dtype=dtype
            )

        group_index = None if self.group_index is None else self.group_index[...]
        for _ in range(self.words.ndim - 2):
            one_layer = jax.vmap(one_layer)
        return one_layer(self.words[...], self.scales[...], self.zeros[...], group_index)

    def logical_axes(self, inputs: str | None, outputs: str | None) -> dict[str, Any]:
        """What the axes of the parameters mean, see `sharding.declared_axes`."""
        # A part of the inputs has groups of its own, unless each input names one, or there is one.
        grouped = inputs if self.group_index is None and self.groups > 1 else None
        return {
            "words": (inputs, outputs),
            "scales": (grouped, outputs),
            "zeros": (grouped, outputs),
            "group_index": (inputs,),
            "bias": (outputs,),
        }

    order = None  # of the inputs, where it is not their own

    def without_bias(self) -> "Quantized":
        """The same matrix alone."""
        index = None if self.group_index is None else self.group_index[...]
        words, scales, zeros = self.words[...], self.scales[...], self.zeros[...]
        return Quantized(words, scales, zeros, bits=self.bits, group_index=index)

    def in_order(self, x: jax.Array) -> tuple[jax.Array, "Quantized"]:
        """The inputs as the matrix has them, and the matrix for them: both as they are."""
        return x, self

    def divides(self, split: str, parts: int) -> bool:
        """Whether its "inputs" or "outputs" can be cut into so many parts, of whole words."""
        if split == "outputs":
            return self.outputs % parts == 0
        own_groups = self.group_index is None and self.groups > 1
        return self.words.shape[-2] % parts == 0 and (self.groups % parts == 0 or not own_groups)

    def part(self, split: str, parts: int) -> "Quantized":
        """The weight whose arrays will be one of so many parts."""
        return self
