"""Random compressed weights, made on the device: what the checks and the measurements share."""

import functools

import jax
import jax.numpy as jnp
from idp_jax.kernels.quant_matmul import layout as quant_layout
from idp_jax.kernels.quant_matmul.api import quant_matmul
from idp_jax.kernels.quant_matmul.packing import pack, unpack
from idp_jax.kernels.sparse24_matmul import layout as sparse_layout
from idp_jax.kernels.sparse24_matmul.api import sparse24_matmul


def arrangement_of(backend: str) -> str:
    """The order of words that a backend reads."""
    return "fragments" if backend == "mosaic_gpu" else "rows"


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def quantised(
    key: jax.Array, bits: int, group_size: int, inputs: int, outputs: int, arrangement: str
) -> quant_layout.KernelWeight:
    """A weight of random words, values of about 1 / sqrt(I)."""
    packed = _checkpoint(key, bits, group_size, inputs, outputs)
    return quant_layout.repack(*packed, bits=bits, arrangement=arrangement)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def sparse(
    key: jax.Array, inputs: int, outputs: int, arrangement: str
) -> sparse_layout.SparseWeight:
    """A 2:4 weight."""
    weights = jax.random.normal(key, (inputs, outputs), jnp.bfloat16) * jnp.bfloat16(inputs**-0.5)
    weights = jnp.where(_kept(inputs, outputs), weights, jnp.bfloat16(0))
    return sparse_layout.from_dense(weights, arrangement=arrangement)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def sparse_codes(
    key: jax.Array, bits: int, group_size: int, inputs: int, outputs: int, arrangement: str
) -> sparse_layout.SparseWeight:
    """A 2:4 weight of random codes, values of about 1 / sqrt(I)."""
    words, scales, zeros = _checkpoint(key, bits, group_size, inputs, outputs)
    codes = unpack(words, bits)
    every = jnp.repeat(zeros, inputs // zeros.shape[0], 0)
    words = pack(jnp.where(_kept(inputs, outputs), codes, every), bits)
    return sparse_layout.from_codes(words, scales, zeros, bits=bits, arrangement=arrangement)


def _kept(inputs: int, outputs: int) -> jax.Array:
    """A 2:4 pattern: every pair of places in turn, along the inputs and along the outputs."""
    pairs = jnp.array([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]], jnp.int32)
    turn = (jnp.arange(inputs)[:, None] // 4 + jnp.arange(outputs)[None]) % 6
    place = jnp.arange(inputs)[:, None, None] % 4
    return (pairs[turn] == place).any(-1)


def _checkpoint(key: jax.Array, bits: int, group_size: int, inputs: int, outputs: int):
    groups = 1 if group_size == -1 else inputs // group_size
    keys = jax.random.split(key, 3)
    words = jax.random.bits(keys[0], (inputs * bits // 32, outputs), jnp.uint32)
    scales = jax.random.uniform(keys[1], (groups, outputs), minval=0.5, maxval=1.5)
    zeros = jax.random.randint(keys[2], (groups, outputs), 0, 2**bits)
    scales = (scales * (inputs**-0.5 / 2 ** (bits - 1))).astype(jnp.float16)
    return jax.lax.bitcast_convert_type(words, jnp.int32), scales, zeros.astype(jnp.uint8)


def multiply(kernel: str, backend: str):
    """The product of a kernel, "quant" or "sparse24", with its backend bound."""
    operation = quant_matmul if kernel == "quant" else sparse24_matmul
    return functools.partial(operation, backend=backend)


def stored_bytes(weight) -> int:
    """Bytes of a weight in memory."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
