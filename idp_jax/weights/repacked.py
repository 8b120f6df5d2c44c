"""Packed and 2:4 sparse weights in the layout of the kernels."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from idp_jax.kernels.codes import GRID_SPAN, TILE
from idp_jax.kernels.devices import best_backend
from idp_jax.kernels.quant_matmul import api as kernels
from idp_jax.kernels.quant_matmul.layout import KernelWeight
from idp_jax.kernels.sharded import unsplittable
from idp_jax.kernels.sparse24_matmul import api as sparse_kernels
from idp_jax.kernels.sparse24_matmul.layout import SparseWeight
from idp_jax.kernels.stack import slice_layer
from idp_jax.weights.dense import Dense, add_bias
from idp_jax.weights.quantized import Quantized


class Repacked(nnx.Module):
    """A `Quantized` or 2:4 sparse weight in the layout of the kernels, for an accelerator.

    Made by `repack`, turned back by `restored`. On a mesh the kernel runs on every device's part of
    the matrix.

    Attributes:
        packed: see the layout.py of kernels/quant_matmul and kernels/sparse24_matmul; layers
            stacked in front.
        bias: [..., O] or None.
        dtype: of the matrix that was read, where that was a dense one.
        backend: "auto", or the backend that must serve.
        filled: how many of its last inputs are none, see `_filled`.
    """

    def __init__(
        self,
        packed: KernelWeight | SparseWeight,
        *,
        bias=None,
        dtype: str = "float32",
        backend: str,
        filled: int = 0,
    ):
        self.packed = nnx.Param(packed)
        self.bias = None if bias is None else nnx.Param(bias)
        self.dtype = dtype
        self.backend = backend
        self.filled = filled

    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiplies x [..., I]: [..., O] in the dtype of x, summed in float32.

        On a mesh it is called by `stage.products`, on every device with its part.
        """
        packed, x = self.packed.get_value(), _behind(x, self.filled)
        if isinstance(packed, SparseWeight):
            y = sparse_kernels.sparse24_matmul(x, packed, backend=self.backend)
        else:
            y = kernels.quant_matmul(x, packed, backend=self.backend)
        return add_bias(y, self.bias)

    def dense(self, dtype=jnp.float32) -> jax.Array:
        """The matrix [..., I, O] that is meant."""
        return self.restored().dense(dtype)

    def restored(self) -> Dense | Quantized:
        """The weight in the checkpoint's layout, bit for bit but for the signs of zeros."""
        packed, group_index = slice_layer(self.packed.get_value()), None
        bias = None if self.bias is None else self.bias[...]
        if isinstance(packed, KernelWeight):
            words, scales, zeros, group_index = kernels.restore(packed)
        elif packed.bits is None:
            return Dense(sparse_kernels.to_dense(packed).astype(self.dtype), bias)
        else:
            words, scales, zeros = sparse_kernels.to_codes(packed)
        assert packed.bits is not None
        if self.filled:
            inputs, groups = packed.inputs - self.filled, packed.groups
            groups = max(1, groups * inputs // packed.inputs)
            words = words[..., : inputs * packed.bits // 32, :]
            scales, zeros = scales[..., :groups, :], zeros[..., :groups, :]
            group_index = None if group_index is None else group_index[..., :inputs]
        return Quantized(words, scales, zeros, bits=packed.bits, group_index=group_index, bias=bias)

    def logical_axes(self, inputs: str | None, outputs: str | None) -> dict[str, Any]:
        """What the axes of the parameters mean, see `sharding.declared_axes`."""
        packed = self.packed.get_value()
        return {"packed": _axes(packed, inputs, outputs) | {"order": (None,)}, "bias": (outputs,)}

    @property
    def order(self) -> jax.Array | None:
        """Of the inputs, int32 [I], where it is not their own (act-order)."""
        return getattr(self.packed.get_value(), "order", None)

    def without_bias(self) -> "Repacked":
        """The same matrix alone."""
        kept = {"dtype": self.dtype, "backend": self.backend, "filled": self.filled}
        return Repacked(self.packed.get_value(), **kept)

    def in_order(self, x: jax.Array) -> tuple[jax.Array, "Repacked"]:
        """The inputs in the order of the words and as many, and the matrix for them."""
        x, whole = _behind(x, self.filled), self._with()
        whole.filled = 0
        if self.order is None:
            return x, whole
        return x[..., self.order], whole._with(order=None)

    def divides(self, split: str, parts: int) -> bool:
        """Whether its "inputs" or "outputs" can be cut into so many parts, of whole tiles."""
        return unsplittable(self.packed.get_value(), split, parts) is None

    def part(self, split: str, parts: int) -> "Repacked":
        """The weight whose arrays will be one of so many parts."""
        if split == "outputs":  # which the arrays tell
            return self
        packed = self.packed.get_value()
        # One group of all inputs stays one: its only row of scales is every part's.
        return self._with(inputs=packed.inputs // parts, groups=max(1, packed.groups // parts))

    def _with(self, **changes) -> "Repacked":
        copy = self.without_bias()
        copy.packed = nnx.Param(dataclasses.replace(self.packed.get_value(), **changes))
        copy.bias = self.bias
        return copy


def _behind(x: jax.Array, count: int) -> jax.Array:
    """Inputs with as many zeros behind them."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count)]) if count else x


def is_compressed(node) -> bool:
    """Whether a node of a model's tree is a weight in the layout of the kernels."""
    return isinstance(node, KernelWeight | SparseWeight)


def _axes(
    packed: KernelWeight | SparseWeight, inputs: str | None, outputs: str | None
) -> dict[str, tuple[str | None, ...]]:
    """What the axes of the arrays mean, layers left out."""
    names = {}
    for name, (of_inputs, of_outputs) in packed.axes.items():
        first = min(axis for axis in (of_inputs, of_outputs, -2) if axis is not None)
        meant = {of_inputs: inputs, of_outputs: outputs}
        names[name] = tuple(meant.get(axis) for axis in range(first, 0))
    return names


def repack(
    weight: Dense | Quantized,
    *,
    backend: str = "auto",
    use_sparse24: bool = False,
    parts: int = 1,
) -> Dense | Quantized | Repacked:
    """Brings a packed or 2:4 sparse weight into the layout of the kernels; can be jitted.

    Where XLA is what "auto" chooses (on a CPU, say), the weight stays as it is.

    Args:
        weight: one layer, or layers stacked in front.
        backend: "auto", "pallas_tpu", "mosaic_gpu" or "xla".
        use_sparse24: store two of every four inputs. The others must be zero, and what is not
            packed must be bfloat16 numbers; then a matrix that is not packed is taken too.
        parts: into which a mesh cuts the inputs; a packed matrix is filled up so that they divide.

    Raises:
        ValueError: scales that kernels do not take (see `kernels.prepare`).
    """
    chosen = best_backend() if backend == "auto" else backend
    if chosen == "xla" or (isinstance(weight, Dense) and not use_sparse24):
        return weight
    filled = 0
    if isinstance(weight, Quantized) and not use_sparse24:
        weight, filled = _filled(weight, parts)
    packed = _packed(weight, chosen, use_sparse24)
    bias = None if weight.bias is None else weight.bias[...]
    dtype = weight.kernel.dtype.name if isinstance(weight, Dense) else "float32"
    return Repacked(packed, bias=bias, dtype=dtype, backend=backend, filled=filled)


def _filled(weight: Quantized, parts: int) -> tuple[Quantized, int]:
    """A weight with more inputs, so many that each part has as many whole tiles and groups.

    What is multiplied by them is zero. It stays as it is where that would make a part no smaller
    than the whole.
    """
    inputs, groups = weight.words.shape[-2] * 32 // weight.bits, weight.groups
    unit = parts * TILE
    if groups > 1:
        unit = math.lcm(parts * math.lcm(TILE, inputs // groups), GRID_SPAN)
    more = -inputs % unit
    if parts == 1 or more == 0 or inputs % groups or (inputs + more) // parts >= inputs:
        return weight, 0
    new_groups = 0 if groups == 1 else more * groups // inputs
    rows = lambda x, count: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, count), (0, 0)])
    index = None if weight.group_index is None else weight.group_index[...]
    if index is not None:
        added = groups + jnp.arange(more, dtype=index.dtype) * groups // inputs
        added = jnp.broadcast_to(added, (*index.shape[:-1], more))
        index = jnp.concatenate([index, added if groups > 1 else jnp.zeros_like(added)], -1)
    whole = Quantized(
        rows(weight.words[...], more * weight.bits // 32),
        rows(weight.scales[...], new_groups),
        rows(weight.zeros[...], new_groups),
        bits=weight.bits,
        group_index=index,
        bias=None if weight.bias is None else weight.bias[...],
    )
    return whole, more


def _packed(
    weight: Dense | Quantized, backend: str, use_sparse24: bool
) -> KernelWeight | SparseWeight:
    if isinstance(weight, Dense):
        kernel = weight.kernel[...].astype(jnp.bfloat16)
        return _over_layers(partial(sparse_kernels.from_dense, backend=backend), kernel)
    arrays = weight.words[...], weight.scales[...], weight.zeros[...]
    if use_sparse24:
        make = partial(sparse_kernels.from_codes, bits=weight.bits, backend=backend)
        return _over_layers(make, *arrays)
    index = None if weight.group_index is None else weight.group_index[...]
    return kernels.prepare(*arrays, bits=weight.bits, group_index=index, backend=backend)


def _over_layers(make, *arrays: jax.Array):
    # One layer at a time: taking quads apart needs several times the memory of what they hold.
    return jax.lax.map(lambda layer: make(*layer), arrays) if arrays[0].ndim > 2 else make(*arrays)
