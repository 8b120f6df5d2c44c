"""Packed and 2:4 sparse matrices of a model in the layout of the kernels, and back.

The invariant: the model computes the same function, and `restore` gives back what was read bit for
bit (scales in 16 bits, where they were such numbers in 32; zeros of a 2:4 matrix without a sign).
"""

import logging
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp

from idp_jax.jobs.machine import available_memory
from idp_jax.kernels.devices import best_backend, platform
from idp_jax.kernels.packing import unpack
from idp_jax.kernels.sharded import unsplittable
from idp_jax.kernels.sparse24_matmul import api as sparse24
from idp_jax.kernels.stack import select_layer
from idp_jax.models.block import Block, layer_slice
from idp_jax.models.decoder import Decoder
from idp_jax.models.matrices import Matrix, matrices, matrix_axes
from idp_jax.sharding import TENSOR_AXIS, constrain_parts
from idp_jax.weights import Dense, Quantized, Repacked, is_compressed, products
from idp_jax.weights import repack as repack_weight

_logger = logging.getLogger(__name__)

# Between two orders of summing in bfloat16; a wrong place or bit gives numbers of order 1.
_LARGEST_DIFFERENCE = 0.05


def repack(
    model: Decoder,
    kernel: str,
    mesh: jax.sharding.Mesh | None = None,
    *,
    use_sparse24: bool = True,
) -> Decoder:
    """The same function with packed and 2:4 sparse matrices in the layout of the kernels.

    A packed matrix that is 2:4 sparse too is stored as both: fewer bytes are read. Where no kernel
    multiplies by that, it is a packed one.

    Args:
        kernel: see `load_model`.
        mesh: where the model lies.
        use_sparse24: see `load_model`.

    Raises:
        ValueError: a packed matrix that the named kernel does not take; with "auto" it stays as it
            is, and so does a dense one.
    """
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        for matrix in matrices(model.config):
            name, reason = matrix.name, None
            weight = getattr(model.layers, name)
            if isinstance(weight, Quantized):
                weight = _narrowed(weight)
                reason = _no_kernel(weight)
            if reason is not None and kernel != "auto":
                raise ValueError(f"{name}: {kernel} cannot multiply by it: {reason}")
            if reason is not None:
                _logger.warning("%s: no kernel multiplies by it (%s); using xla", name, reason)
                continue
            if isinstance(weight, Dense) and not use_sparse24:
                continue
            is_sparse = _sparse_kernel(matrix, weight, model.embedding.dtype.name, kernel)
            if isinstance(weight, Dense) and not is_sparse:
                continue
            repacked = repack_matrix(weight, matrix, backend=kernel, use_sparse24=is_sparse)
            model = model.with_layers(model.layers.replace(**{name: repacked}))
    return model


@partial(jax.jit, static_argnames=("matrix", "backend", "use_sparse24"))
def repack_matrix(
    weight: Dense | Quantized, matrix: Matrix, *, backend: str, use_sparse24: bool
) -> Dense | Quantized | Repacked:
    """A matrix of all layers as the kernels read it, and where they do."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty or matrix.split == "outputs" else mesh.shape[TENSOR_AXIS]
    made = {"backend": backend, "use_sparse24": use_sparse24, "parts": parts}
    repacked = repack_weight(weight, **made)
    return constrain_parts(repacked, repacked.logical_axes(*matrix.axes))


def _sparse_kernel(matrix: Matrix, weight: Dense | Quantized, dtype: str, backend: str) -> bool:
    """Whether a 2:4 kernel multiplies by a matrix; says why not where the matrix is 2:4 sparse."""
    backend = best_backend() if backend == "auto" else backend
    if backend == "xla" or getattr(weight, "group_index", None) is not None:
        return False
    is_sparse, exact = jax.tree.map(bool, _pattern(weight))
    if not is_sparse:
        return False
    reason = "its values are no bfloat16 numbers"
    if exact:
        reason = _no_sparse_kernel(weight, dtype, backend, matrix.split)
    if reason is not None and isinstance(weight, Dense):
        _logger.warning(
            "%s: no 2:4 kernel multiplies by it (%s); it stays dense", matrix.name, reason
        )
    return reason is None


def _no_sparse_kernel(
    weight: Dense | Quantized, dtype: str, backend: str, split: str
) -> str | None:
    mesh = jax.sharding.get_abstract_mesh()
    make = partial(repack_weight, backend=backend, use_sparse24=True)
    try:
        repacked = jax.eval_shape(lambda weight: make(layer_slice(weight, 0)), weight)
    except ValueError as error:
        return str(error)
    packed = repacked.packed.get_value()
    reason = sparse24.unsupported(packed, backend, dtype)
    if reason is None and not mesh.empty:
        reason = unsplittable(packed, split, mesh.shape[TENSOR_AXIS])
    return reason


@jax.jit
def _pattern(weight: Dense | Quantized) -> tuple[jax.Array, jax.Array]:
    """Whether at most two of every four inputs are not zero, and all are bfloat16 numbers."""

    def of_layer(layer: Dense | Quantized) -> tuple[jax.Array, jax.Array]:
        if isinstance(layer, Dense):
            matrix = layer.kernel[...]
            kept, exact = matrix != 0, matrix.astype(jnp.bfloat16).astype(matrix.dtype) == matrix
        else:
            codes, zeros = unpack(layer.words[...], layer.bits), layer.zeros[...]
            every = jnp.repeat(zeros, codes.shape[0] // zeros.shape[0], 0)
            kept, exact = codes != every, jnp.bool_(True)
        kept = jnp.pad(kept, ((0, -kept.shape[0] % 4), (0, 0))).reshape(-1, 4, kept.shape[1])
        return (kept.sum(1, dtype=jnp.int32) <= 2).all(), exact.all()

    # One layer at a time, for the memory that its codes take.
    return jax.tree.map(jnp.all, jax.lax.map(of_layer, weight))


def _narrowed(weight: Quantized) -> Quantized:
    """The weight with its scales in 16 bits, where they are such numbers."""
    scales = weight.scales[...]
    for dtype in (jnp.float16, jnp.bfloat16):
        narrow = scales.astype(dtype)
        if scales.dtype == jnp.float32 and jnp.array_equal(narrow.astype(scales.dtype), scales):
            scales = narrow
    index = None if weight.group_index is None else weight.group_index[...]
    bias = None if weight.bias is None else weight.bias[...]
    words, zeros = weight.words[...], weight.zeros[...]
    return Quantized(words, scales, zeros, bits=weight.bits, group_index=index, bias=bias)


def _no_kernel(weight: Quantized) -> str | None:
    """Why a weight has no place in the layout of the kernels, or None."""
    groups = weight.groups
    if weight.scales.dtype not in (jnp.float16, jnp.bfloat16):
        return f"its scales are {weight.scales.dtype}, and no 16-bit numbers"
    if weight.group_index is None:
        return None
    members = (weight.group_index[...][..., None] == jnp.arange(groups)).sum(-2)
    even = bool((members == members.max()).all())
    return None if even else "its groups have different sizes"


def wrong_products(model: Decoder, mesh: jax.sharding.Mesh | None = None) -> list[str]:
    """The matrices whose kernel does not give what the matrix written out gives.

    A new device or compiler may break a kernel in silence; one layer of each matrix, with a row and
    with a batch of them, costs milliseconds at load.
    """
    wrong = []
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        for name in model.layers.weight_names:
            weight = getattr(model.layers, name)
            if isinstance(weight, Repacked):
                axes = matrix_axes(name)
                off = _difference(weight, model.embedding.dtype.name, axes)
                if off > _LARGEST_DIFFERENCE:
                    wrong.append(name)
    return wrong


@partial(jax.jit, static_argnames=("dtype", "axes"))
def _difference(weight: Repacked, dtype: str, axes: tuple[str, str]) -> jax.Array:
    """Between both products with the last layer, relative to the largest."""
    last = jax.tree.leaves(weight)[0].shape[0] - 1
    one = layer_slice(weight, last)
    bias = None if one.bias is None else one.bias[...]
    dense = Dense(one.dense(dtype), bias)
    # As the model has it: where it lies in the stack.
    here = select_layer(weight.packed.get_value(), jnp.int32(last))
    weight = Repacked(here, bias=bias, backend=weight.backend, filled=weight.filled)
    largest = jnp.float32(0)
    for rows in (1, 128):  # few and many may be different kernels
        x = jax.random.normal(jax.random.key(0), (rows, dense.kernel[...].shape[0]), dtype)
        y = products(x, [weight], [axes])[0].astype(jnp.float32)
        expected = dense(x).astype(jnp.float32)
        off = jnp.abs(y - expected).max() / jnp.abs(expected).max()
        # A maximum over devices may drop NaN.
        largest = jnp.maximum(largest, jnp.where(jnp.isfinite(y).all(), off, jnp.inf))
    return largest


def restore(model: Decoder) -> Decoder:
    """The same model with packed and sparse matrices in the layout of the files again."""
    named = {name: getattr(model.layers, name) for name in model.layers.weight_names}
    back = {name: w.restored() for name, w in named.items() if isinstance(w, Repacked)}
    return model.with_layers(model.layers.replace(**back)) if back else model


# Of the free memory, what written-out matrices may take: they are made beside the packed ones.
_MOST_OF_MEMORY = 0.6


def better_dense(model: Decoder) -> bool:
    """Whether packed matrices are faster written out, and there is room for them."""
    if jax.default_backend() != "cpu":
        return False
    named = {name: getattr(model.layers, name) for name in model.layers.weight_names}
    wanted = sum(
        weight.words.size * 32 // weight.bits * model.embedding.dtype.itemsize
        for weight in named.values()
        if isinstance(weight, Quantized)
    )
    free = available_memory()
    if free is None or wanted < _MOST_OF_MEMORY * free:
        return True
    _logger.warning(
        "the packed matrices stay packed: written out they would take %.1f GB, %.1f GB are free",
        wanted / 1e9,
        free / 1e9,
    )
    return False


def layers_apart(model: Decoder) -> tuple[Block, ...] | None:
    """The layers one by one, where few rows meet them and that is faster; None where it is not.

    A loop over stacked layers cuts its matrices out of the stack. On a CPU that is a copy, which
    takes as long as their products with some rows do. Here they are cut out once, for many steps,
    if there is room for all of them (traceable).
    """
    leaves = jax.tree.leaves(model.layers, is_leaf=is_compressed)
    if platform() != "cpu" or any(map(is_compressed, leaves)):
        return None
    free, wanted = available_memory(), sum(leaf.nbytes for leaf in leaves)
    if free is not None and wanted > _MOST_OF_MEMORY * free:
        return None
    return tuple(layer_slice(model.layers, number) for number in range(model.config.num_layers))


@jax.jit
def _expand_layers(layers: Block, like: jax.Array) -> Block:
    dense = {}
    for name in layers.weight_names:
        weight = getattr(layers, name)
        bias = None if weight.bias is None else weight.bias[...]
        dense[name] = Dense(weight.dense(like.dtype), bias)
    return layers.replace(**dense)


def expand(model: Decoder) -> Decoder:
    """The same function with every matrix written out."""
    named = (getattr(model.layers, name) for name in model.layers.weight_names)
    if not any(isinstance(weight, Quantized | Repacked) for weight in named):
        return model
    return model.with_layers(_expand_layers(model.layers, model.embedding[...]))
