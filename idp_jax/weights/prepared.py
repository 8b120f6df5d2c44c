"""Packed and 2:4 sparse weights in the layout of the kernels."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from idp_jax.kernels.devices import best_backend
from idp_jax.kernels.quant_matmul import api as kernels
from idp_jax.kernels.quant_matmul.layout import KernelWeight
from idp_jax.kernels.sharded import partition, sharded_matmul, unsplittable
from idp_jax.kernels.sparse24_matmul import api as sparse_kernels
from idp_jax.kernels.sparse24_matmul.layout import SparseWeight
from idp_jax.kernels.stack import slice_layer
from idp_jax.weights.dense import Dense, add_bias
from idp_jax.weights.quantized import Quantized


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
            return add_bias(multiply(x, packed), self.bias)
        return add_bias(_on_mesh(multiply, x, packed, mesh, self.split), self.bias)

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
