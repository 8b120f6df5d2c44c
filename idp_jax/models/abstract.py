"""Any model without its checkpoint, from the configuration alone: as shapes, or as random numbers.

Planning, compiling ahead and tests want models that nobody has downloaded. The invariant: both give
the tree, shapes and dtypes that loading such a checkpoint gives, because `abstract` is `random`
traced and never run, and layouts of kernels are made by the repacking that `load_model` does.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from idp_jax.kernels.packing import pack
from idp_jax.models.block import Block
from idp_jax.models.config import ModelConfig
from idp_jax.models.decoder import OPT_POSITION_OFFSET, Decoder
from idp_jax.models.layers import Norm
from idp_jax.models.matrices import Matrix, matrices
from idp_jax.weights import Dense, Quantized, Repacked, repack

# Large enough that a forgotten bias, norm or position shows in the logits.
_NORM_DEVIATION = _BIAS_DEVIATION = 0.2
_EMBEDDING_DEVIATION = 0.4

_Source = jax.Array | np.random.Generator  # of random numbers, on the device or on the host


@dataclass(frozen=True)
class Storage:
    """How the matrices of the blocks are kept.

    Attributes:
        bits: 2, 3, 4 or 8, packed as GPTQ packs them; None for floating point.
        group_size: inputs that share a scale and a zero; -1 for all of a column's.
        act_order: whether the group of every input is named (GPTQ's `g_idx`).
        scale_dtype: of the scales.
        sparse24: whether two of every four inputs are zero.
        backend: "pallas_tpu" or "mosaic_gpu" for the layout of its kernels, "auto" for that of the
            best that this machine has; None for the layout of the files.
        parts: into which a mesh cuts the matrices.
    """

    bits: int | None = None
    group_size: int = 128
    act_order: bool = False
    scale_dtype: str = "float16"
    sparse24: bool = False
    backend: str | None = None
    parts: int = 1


DENSE = Storage()


def abstract(
    config: ModelConfig,
    *,
    dtype: DTypeLike = "float32",
    weights: Storage | Mapping[str, Storage] = DENSE,
) -> Decoder:
    """A model whose leaves are `jax.ShapeDtypeStruct`; it takes no memory. Arguments as `random`.

    It can be given to `jax.jit(...).lower`, to `sharding.shardings`, or be summed up.
    """
    make = partial(random, config, dtype=dtype, weights=weights)
    return jax.eval_shape(make, jax.random.key(0))


def random(
    config: ModelConfig,
    key: jax.Array | int,
    *,
    dtype: DTypeLike = "float32",
    weights: Storage | Mapping[str, Storage] = DENSE,
) -> Decoder:
    """A model of random numbers, biases and norms included.

    Args:
        config: its shape.
        key: a JAX key, to draw on the device (can be jitted); or a seed, to draw on the host, where
            nothing need be compiled. Either gives a part of the model the same numbers whatever the
            other parts are.
        dtype: of embeddings, norms, biases and dense matrices.
        weights: how the blocks' matrices are kept: all of them, or each by its name.

    Raises:
        ValueError: kernels that do not take the matrices.
    """
    hidden, embedding = config.hidden_dim, config.embedding_dim

    def draw(name: str, *shape: int, deviation: float):
        return _normal(_named(key, name), shape, dtype, deviation)

    def linear(name: str, inputs: int, outputs: int) -> Dense:
        return Dense(draw(name, inputs, outputs, deviation=inputs**-0.5))

    positions, projected = None, hidden != embedding
    if config.rope is None:
        places = config.max_positions + OPT_POSITION_OFFSET
        positions = draw("positions", places, hidden, deviation=_EMBEDDING_DEVIATION)
    model = Decoder(
        config,
        embedding=draw("embedding", config.vocab_size, embedding, deviation=_EMBEDDING_DEVIATION),
        layers=random_layers(config, key, dtype=dtype, weights=weights),
        final_norm=_norm("final_norm", config, key, dtype) if config.final_norm else None,
        head=None if config.tied_embeddings else linear("head", embedding, config.vocab_size),
        positions=positions,
        project_in=linear("project_in", embedding, hidden) if projected else None,
        project_out=linear("project_out", hidden, embedding) if projected else None,
    )
    return jax.tree.map(jnp.asarray, model)


def random_layers(
    config: ModelConfig,
    key: jax.Array | int,
    *,
    dtype: DTypeLike = "float32",
    weights: Storage | Mapping[str, Storage] = DENSE,
) -> Block:
    """The layers of `random`, stacked."""
    count, made = config.num_layers, {}
    for matrix in matrices(config):
        storage = weights if isinstance(weights, Storage) else weights[matrix.name]
        made[matrix.name] = random_weight(matrix, key, storage, dtype=dtype, layers=count)
    attention_norm, mlp_norm = (
        jax.tree.map(jnp.asarray, _norm(name, config, key, dtype, count))
        for name in ("attention_norm", "mlp_norm")
    )
    return Block(made, attention_norm, mlp_norm, config)


def random_weight(
    matrix: Matrix,
    key: jax.Array | int,
    storage: Storage = DENSE,
    *,
    dtype: DTypeLike = "float32",
    layers: int = 1,
) -> Dense | Quantized | Repacked:
    """One matrix of all layers [L, I, O], with values of about 1 / sqrt(I)."""
    rng, dtype = _named(key, matrix.name), jnp.dtype(dtype)
    if isinstance(rng, np.random.Generator):
        return _stored(_weight(rng, matrix, storage, dtype, layers), matrix, storage)
    return _weight_on_device(rng, matrix, storage, dtype, layers)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _weight_on_device(key: jax.Array, matrix: Matrix, storage: Storage, dtype, layers: int):
    # One program, so that what is drawn and what is repacked are not held side by side.
    return _stored(_weight(key, matrix, storage, dtype, layers), matrix, storage)


def _stored(weight: Dense | Quantized, matrix: Matrix, storage: Storage):
    weight = jax.tree.map(jnp.asarray, weight)
    if storage.backend is None:
        return weight
    parts = storage.parts if matrix.split == "inputs" else 1
    made = {"backend": storage.backend, "use_sparse24": storage.sparse24, "parts": parts}
    return repack(weight, **made)


# What follows computes in numpy on the host, and in JAX on the device.


def _weight(rng: _Source, matrix: Matrix, storage: Storage, dtype, layers: int):
    rngs = _split(rng, 2)
    bias = None
    if matrix.bias:
        bias = _normal(rngs[0], (layers, matrix.outputs), dtype, _BIAS_DEVIATION)
    shape = (layers, matrix.inputs, matrix.outputs)
    if storage.bits is not None:
        return _packed(rngs[1], shape, storage, storage.bits, bias)
    if not storage.sparse24:
        return Dense(_normal(rngs[1], shape, dtype, matrix.inputs**-0.5), bias)
    rngs = _split(rngs[1], 2)
    kernel = _normal(rngs[0], shape, jnp.bfloat16, matrix.inputs**-0.5).astype(dtype)
    return Dense(kernel * _two_of_four(rngs[1], shape).astype(dtype), bias)


def _packed(
    rng: _Source, shape: tuple[int, int, int], storage: Storage, bits: int, bias
) -> Quantized:
    layers, inputs, outputs = shape
    groups = 1 if storage.group_size == -1 else inputs // storage.group_size
    grid, rngs = (layers, groups, outputs), _split(rng, 5)
    zeros = _bits(rngs[0], grid, "uint8") >> (8 - bits)
    fractions = _bits(rngs[1], grid, "uint16").astype("float32") / 2**16
    scales = (fractions + 0.5) * (inputs**-0.5 / 2 ** (bits - 1))
    if storage.sparse24:
        codes = _bits(rngs[2], shape, "uint8") >> (8 - bits)
        dropped = zeros.repeat(inputs // groups, 1)
        codes = jnp.where(_two_of_four(rngs[3], shape), codes, dropped)
        words = pack(codes.astype(jnp.uint32), bits, axis=1)
    else:  # random codes are random bits: nothing need be packed
        words = _bits(rngs[2], (layers, inputs * bits // 32, outputs), "uint32").view("int32")
    index = None
    if storage.act_order:
        order = _bits(rngs[4], (layers, inputs), "uint32").argsort(1)
        index = order.astype("int32") % groups
    scales = scales.astype(storage.scale_dtype)
    return Quantized(words, scales, zeros, bits=bits, group_index=index, bias=bias)


def _two_of_four(rng: _Source, shape: tuple[int, int, int]):
    """Which inputs a 2:4 pattern keeps: bool [L, I, O]."""
    layers, inputs, outputs = shape
    drawn = _bits(rng, (layers, inputs // 4, 4, outputs), "uint32")
    return (drawn.argsort(2) < 2).reshape(shape)


def _norm(
    name: str, config: ModelConfig, key: jax.Array | int, dtype, layers: int | None = None
) -> Norm:
    centred = config.architecture == "opt"
    shape = (config.hidden_dim,) if layers is None else (layers, config.hidden_dim)
    scale = bias = None
    if config.norm_affine:
        scale = _normal(_named(key, f"{name}.scale"), shape, dtype, _NORM_DEVIATION, mean=1.0)
    if config.norm_affine and centred:
        bias = _normal(_named(key, f"{name}.bias"), shape, dtype, _NORM_DEVIATION)
    return Norm(scale, bias, centred=centred, epsilon=config.norm_epsilon)


def _named(key: jax.Array | int, name: str) -> _Source:
    number = zlib.crc32(name.encode())
    if isinstance(key, int):
        return np.random.default_rng((key, number))
    return jax.random.fold_in(key, number)


def _split(rng: _Source, count: int) -> Sequence[_Source]:
    if isinstance(rng, np.random.Generator):
        return rng.spawn(count)
    return list(jax.random.split(rng, count))


def _normal(rng: _Source, shape: tuple[int, ...], dtype, deviation: float, mean: float = 0.0):
    if isinstance(rng, np.random.Generator):
        numbers = rng.standard_normal(shape, np.float32)
    else:
        numbers = jax.random.normal(rng, shape, jnp.float32)
    return (numbers * deviation + mean).astype(dtype)


def _bits(rng: _Source, shape: tuple[int, ...], dtype: str):
    if isinstance(rng, np.random.Generator):
        return rng.integers(np.iinfo(dtype).max, size=shape, dtype=dtype, endpoint=True)
    return jax.random.bits(rng, shape, dtype)
