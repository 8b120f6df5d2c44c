"""The kinds of weight: modules that multiply activations, whatever their storage.

Kernels are kept as [I, O] (inputs first), so that activations multiply from the left without a
transpose; checkpoints and the papers'
compression algorithms use [O, I], and the formats turn them on the way in and out. The invariant:
`w(x)` equals `x @ w.dense() + bias`.
To add a kind, write a module with `__call__(x)`, `dense(dtype)` and `bias`; the models need nothing
else.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from idp_jax.kernels.dispatch import best_backend
from idp_jax.kernels.quant_matmul import api as kernels
from idp_jax.kernels.quant_matmul import xla as quant_matmul
from idp_jax.kernels.quant_matmul.layout import KernelWeight
from idp_jax.kernels.sharded import partition, sharded_matmul, unsplittable
from idp_jax.kernels.sparse24_matmul import api as sparse_kernels
from idp_jax.kernels.sparse24_matmul.layout import SparseWeight
from idp_jax.kernels.stack import alone

Array = jax.Array | np.ndarray  # a model read from disk holds numpy arrays until it is placed


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    y = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def _add_bias(y: jax.Array, bias: nnx.Param | None) -> jax.Array:
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
        return _add_bias(_product(x, self.kernel[...]), self.bias)

    def dense(self, dtype=jnp.float32) -> jax.Array:
        """The matrix [..., I, O]."""
        return self.kernel[...].astype(dtype)


class Quantized(nnx.Module):
    """Integer codes packed into words, in GPTQ's layout: w[i, o] = scales[g(i), o] * (code[i, o] -
    zeros[g(i), o]).

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
        return _add_bias(y, self.bias)

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


class Prepared(nnx.Module):
    """A `Quantized` or 2:4 sparse weight in the layout of the kernels, for models on an
    accelerator.

    Made by `for_kernels`, turned back by `restored`. On a mesh the kernel runs on every device's
    part of the matrix.

    Attributes:
        packed: see the layout.py of kernels/quant_matmul and kernels/sparse24_matmul; layers
            stacked in front.
        bias: [..., O] or None.
        dtype: of the matrix that was read, where that was a dense one.
        backend: "auto", or the backend that must serve.
        split: what a mesh's `model` axis cuts, "outputs" or "inputs".
    """

    def __init__(
        self,
        packed: KernelWeight | SparseWeight,
        *,
        bias=None,
        dtype: str = "float32",
        backend: str,
        split: str,
    ):
        self.packed = nnx.Param(packed)
        self.bias = None if bias is None else nnx.Param(bias)
        self.dtype = dtype
        self.backend = backend
        self.split = split

    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiplies x [..., I]: [..., O] in the dtype of x, summed in float32."""
        packed, mesh = self.packed.get_value(), jax.sharding.get_abstract_mesh()
        sparse = isinstance(packed, SparseWeight)
        operation = sparse_kernels.sparse24_matmul if sparse else kernels.quant_matmul
        multiply = partial(operation, backend=self.backend)
        if mesh.empty or mesh.size == 1 or self.backend == "xla":
            return _add_bias(multiply(x, packed), self.bias)
        return _add_bias(_on_mesh(multiply, x, packed, mesh, self.split), self.bias)

    def dense(self, dtype=jnp.float32) -> jax.Array:
        """The matrix [..., I, O] that is meant."""
        return self.restored().dense(dtype)

    def restored(self) -> Dense | Quantized:
        """The weight in the checkpoint's layout, bit for bit but for the signs of zeros."""
        packed, group_index = alone(self.packed.get_value()), None
        bias = None if self.bias is None else self.bias[...]
        if isinstance(packed, KernelWeight):
            words, scales, zeros, group_index = kernels.restore(packed)
        elif packed.bits is None:
            return Dense(sparse_kernels.to_dense(packed).astype(self.dtype), bias)
        else:
            words, scales, zeros = sparse_kernels.to_codes(packed)
        return Quantized(words, scales, zeros, bits=packed.bits, group_index=group_index, bias=bias)


def is_compressed(node) -> bool:
    """Whether a node of a model's tree is a weight in the layout of the kernels."""
    return isinstance(node, KernelWeight | SparseWeight)


def _on_mesh(multiply, x: jax.Array, packed, mesh, split: str) -> jax.Array:
    # What cannot be cut is multiplied whole by every device of the model axis.
    parts = mesh.shape["model"]
    whole = unsplittable(packed, split, parts) is not None
    batch = tuple(axis for axis in ("data", "fsdp") if mesh.shape[axis] > 1)
    rows = math.prod(mesh.shape[axis] for axis in batch)
    cut = batch if batch and x.shape[0] % rows == 0 else None
    return sharded_matmul(
        multiply, x, packed, mesh=mesh, axis=None if whole else "model", split=split, batch=cut
    )


def for_kernels(
    weight: Dense | Quantized,
    *,
    backend: str = "auto",
    split: str = "outputs",
    sparse: bool = False,
) -> Dense | Quantized | Prepared:
    """Brings a packed or 2:4 sparse weight into the layout of the kernels; can be jitted.

    Where XLA is what "auto" chooses (on a CPU, say), the weight stays as it is. Inside
    `jax.set_mesh` the result is placed as the kernels will read it.

    Args:
        weight: one layer, or layers stacked in front.
        backend: "auto", "pallas_tpu", "mosaic_gpu" or "xla".
        split: what a mesh's `model` axis cuts, "outputs" or "inputs".
        sparse: at most two of every four inputs are not zero, and what is not packed are bfloat16
            numbers; then a matrix that is not packed is taken too.

    Raises:
        ValueError: scales that kernels do not take (see `kernels.prepare`).
    """
    chosen = best_backend() if backend == "auto" else backend
    if chosen == "xla" or (isinstance(weight, Dense) and not sparse):
        return weight
    packed = _packed(weight, chosen, sparse)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        whole = unsplittable(packed, split, mesh.shape["model"]) is not None
        places = partition(packed, None if whole else "model", split)
        packed = jax.lax.with_sharding_constraint(packed, places)
    bias = None if weight.bias is None else weight.bias[...]
    dtype = weight.kernel.dtype.name if isinstance(weight, Dense) else "float32"
    return Prepared(packed, bias=bias, dtype=dtype, backend=backend, split=split)


def _packed(weight: Dense | Quantized, backend: str, sparse: bool) -> KernelWeight | SparseWeight:
    if isinstance(weight, Dense):
        kernel = weight.kernel[...].astype(jnp.bfloat16)
        return _over_layers(partial(sparse_kernels.from_dense, backend=backend), kernel)
    arrays = weight.words[...], weight.scales[...], weight.zeros[...]
    if sparse:
        make = partial(sparse_kernels.from_codes, bits=weight.bits, backend=backend)
        return _over_layers(make, *arrays)
    index = None if weight.group_index is None else weight.group_index[...]
    return kernels.prepare(*arrays, bits=weight.bits, group_index=index, backend=backend)


def _over_layers(make, *arrays: jax.Array):
    # One layer at a time: taking quads apart needs several times the memory of what they hold.
    return jax.lax.map(lambda own: make(*own), arrays) if arrays[0].ndim > 2 else make(*arrays)


class Lora(nnx.Module):
    """A frozen weight with a low-rank update beside it: y = base(x) + scale * (x @ a) @ b.

    Source: "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.

    Attributes:
        base: any other kind of weight.
        a: [..., I, r]; b: [..., r, O].
        scale: alpha / r.
    """

    def __init__(
        self, base: "Dense | Quantized | Prepared", a: jax.Array, b: jax.Array, scale: float
    ):
        self.base = base
        self.a = nnx.Param(a)
        self.b = nnx.Param(b)
        self.scale = scale

    @property
    def bias(self) -> nnx.Param | None:
        """The bias of the frozen weight."""
        return self.base.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiplies x [..., I]: [..., O] in the dtype of x."""
        update = _product(_product(x, self.a[...]), self.b[...])
        return self.base(x) + update * jnp.asarray(self.scale, x.dtype)

    def dense(self, dtype=jnp.float32) -> jax.Array:
        """The merged matrix [..., I, O]."""
        update = jnp.matmul(self.a[...], self.b[...], precision=jax.lax.Precision.HIGHEST)
        merged = self.base.dense(jnp.float32) + update.astype(jnp.float32) * jnp.float32(self.scale)
        return merged.astype(dtype)
