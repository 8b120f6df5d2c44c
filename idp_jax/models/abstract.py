"""Any model without its checkpoint, from the configuration alone: as shapes, or as random numbers.

Planning, compiling ahead and tests want models that nobody has downloaded. The invariant: both give
the tree, shapes and dtypes that loading such a checkpoint gives, because `abstract` is `random`
traced and never run, and layouts of kernels are made by the repacking that `load_model` does.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
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
    """

    bits: int | None = None
    group_size: int = 128
    act_order: bool = False
    scale_dtype: str = "float16"
    sparse24: bool = False
    backend: str | None = None


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
    key: jax.Array,
    *,
    dtype: DTypeLike = "float32",
    weights: Storage | Mapping[str, Storage] = DENSE,
) -> Decoder:
    """A model of random numbers, biases and norms included; can be jitted.

    Args:
        config: its shape.
        key: the same one gives the same numbers wherever two kinds of model have the same part.
        dtype: of embeddings, norms, biases and dense matrices.
        weights: how the blocks' matrices are kept: all of them, or each by its name.

    Raises:
        ValueError: kernels that do not take the matrices.
    """
    draw = partial(_draw, key, dtype=jnp.dtype(dtype))
    hidden, embedding = config.hidden_dim, config.embedding_dim

    def linear(name: str, inputs: int, outputs: int) -> Dense:
        return Dense(draw(name, (inputs, outputs), deviation=inputs**-0.5))

    learned, projected = config.rope is None, hidden != embedding
    places = (config.max_positions + OPT_POSITION_OFFSET, hidden)
    return Decoder(
        config,
        embedding=draw("embedding", (config.vocab_size, embedding), deviation=_EMBEDDING_DEVIATION),
        layers=random_layers(config, key, dtype=dtype, weights=weights),
        final_norm=_norm("final_norm", config, draw) if config.final_norm else None,
        head=None if config.tied_embeddings else linear("head", embedding, config.vocab_size),
        positions=draw("positions", places, deviation=_EMBEDDING_DEVIATION) if learned else None,
        project_in=linear("project_in", embedding, hidden) if projected else None,
        project_out=linear("project_out", hidden, embedding) if projected else None,
    )


def random_layers(
    config: ModelConfig,
    key: jax.Array,
    *,
    dtype: DTypeLike = "float32",
    weights: Storage | Mapping[str, Storage] = DENSE,
) -> Block:
    """The layers of `random`, stacked."""
    draw = partial(_draw, key, dtype=jnp.dtype(dtype))
    made = {}
    for matrix in matrices(config):
        storage = weights if isinstance(weights, Storage) else weights[matrix.name]
        made[matrix.name] = random_weight(
            matrix, _named(key, matrix.name), storage, dtype=dtype, layers=config.num_layers
        )
    norm = partial(_norm, config=config, draw=draw, layers=config.num_layers)
    return Block(made, norm("attention_norm"), norm("mlp_norm"), config)


def random_weight(
    matrix: Matrix,
    key: jax.Array,
    storage: Storage = DENSE,
    *,
    dtype: DTypeLike = "float32",
    layers: int = 1,
) -> Dense | Quantized | Repacked:
    """One matrix of all layers [L, I, O], with values of about 1 / sqrt(I)."""
    return _random_weight(key, matrix, storage, jnp.dtype(dtype).name, layers)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _random_weight(key: jax.Array, matrix: Matrix, storage: Storage, dtype: str, layers: int):
    bias_key, key = jax.random.split(key)
    bias = None
    if matrix.bias:
        bias = jax.random.normal(bias_key, (layers, matrix.outputs), dtype)
        bias *= jnp.asarray(_BIAS_DEVIATION, dtype)
    make = _dense if storage.bits is None else _packed
    weight = make(key, (layers, matrix.inputs, matrix.outputs), storage, dtype, bias)
    if storage.backend is None:
        return weight
    options = {"backend": storage.backend, "split": matrix.split}
    return repack(weight, **options, use_sparse24=storage.sparse24)


def _dense(key, shape: tuple[int, int, int], storage: Storage, dtype: str, bias) -> Dense:
    keys = jax.random.split(key)
    kernel = jax.random.normal(keys[0], shape, dtype) * jnp.asarray(shape[1] ** -0.5, dtype)
    if storage.sparse24:
        kept = jnp.where(_two_of_four(keys[1], shape), kernel, jnp.zeros((), dtype))
        kernel = kept.astype(jnp.bfloat16).astype(dtype)
    return Dense(kernel, bias)


def _packed(key, shape: tuple[int, int, int], storage: Storage, dtype: str, bias) -> Quantized:
    layers, inputs, outputs = shape
    bits = storage.bits
    assert bits is not None
    groups = 1 if storage.group_size == -1 else inputs // storage.group_size
    keys = jax.random.split(key, 5)
    grid = (layers, groups, outputs)
    # Every zero point is possible. Codes are random bits, so words can be drawn without packing.
    zeros = jax.random.bits(keys[0], grid, jnp.uint8) >> (8 - bits)
    scale = inputs**-0.5 / 2 ** (bits - 1)
    scales = jax.random.uniform(keys[1], grid, jnp.float32, 0.5 * scale, 1.5 * scale)
    words = jax.random.bits(keys[2], (layers, inputs * bits // 32, outputs), jnp.uint32)
    words = jax.lax.bitcast_convert_type(words, jnp.int32)
    if storage.sparse24:
        codes = jax.random.bits(keys[2], shape, jnp.uint8) >> (8 - bits)
        dropped = jnp.repeat(zeros, inputs // groups, 1)
        codes = jnp.where(_two_of_four(keys[3], shape), codes, dropped)
        words = pack(codes.astype(jnp.uint32), bits, axis=1)
    index = None
    if storage.act_order:
        runs = jnp.arange(inputs, dtype=jnp.int32) % groups
        index = jax.vmap(jax.random.permutation, (0, None))(jax.random.split(keys[4], layers), runs)
    scales = scales.astype(storage.scale_dtype)
    return Quantized(words, scales, zeros, bits=bits, group_index=index, bias=bias)


def _two_of_four(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Which inputs a 2:4 pattern keeps: bool [L, I, O]."""
    layers, inputs, outputs = shape
    drawn = jax.random.bits(key, (layers, inputs // 4, 4, outputs), jnp.uint32)
    return (drawn.argsort(2) < 2).reshape(shape)


def _norm(name: str, config: ModelConfig, draw, layers: int | None = None) -> Norm:
    centred = config.architecture == "opt"
    scale = bias = None
    shape = (config.hidden_dim,) if layers is None else (layers, config.hidden_dim)
    if config.norm_affine:
        scale = draw(f"{name}.scale", shape, deviation=_NORM_DEVIATION, mean=1.0)
    if config.norm_affine and centred:
        bias = draw(f"{name}.bias", shape, deviation=_NORM_DEVIATION)
    return Norm(scale, bias, centred=centred, epsilon=config.norm_epsilon)


def _named(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _draw(key: jax.Array, name: str, shape, *, dtype, deviation: float, mean: float = 0.0):
    return _normal(_named(key, name), shape, dtype, mean, deviation)


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype, mean, deviation) -> jax.Array:
    mean, deviation = (jnp.asarray(number, dtype) for number in (mean, deviation))
    return mean + deviation * jax.random.normal(key, shape, dtype)
