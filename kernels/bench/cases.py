"""The weights that the checks and the measurements share: random ones, or only their shapes."""

import functools
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from idp_jax.kernels.packing import pack, unpack
from idp_jax.kernels.quant_matmul.api import quant_matmul
from idp_jax.kernels.quant_matmul.layout import repack
from idp_jax.kernels.sparse24_matmul.api import sparse24_matmul
from idp_jax.kernels.sparse24_matmul.layout import from_codes, from_dense
from idp_jax.kernels.stack import select_layer

LAYERS = 8
"""Layers of a walk."""


EVERY_BITS = "none,2,3,4,8"
BITS_HELP = "bits of the codes, with commas; none is 2:4 with bfloat16 values"


def parse_bits(text: str) -> list[int | None]:
    """The bits of an option such as "none,2,3"."""
    return [None if word == "none" else int(word) for word in text.split(",")]


def first_line(error: Exception) -> str:
    """What an error says, for a table."""
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    return "failed: " + said[:100].replace("|", "/")


class Kind(NamedTuple):
    """A kind of compressed weight.

    Attributes:
        operation: "quant" or "sparse24".
        bits: of a code; None for 2:4 with bfloat16 values.
        group_size: inputs of a group; -1 for one group of all inputs.
    """

    operation: str
    bits: int | None
    group_size: int = -1

    @property
    def name(self) -> str:
        """What the tables call it."""
        quantised = f"{self.bits} bit, group {self.group_size}"
        if self.operation == "quant":
            return quantised
        return "2:4" if self.bits is None else f"2:4, {quantised}"


def every_kind(group_sizes: Iterable[int]) -> list[Kind]:
    """Packed weights of all bits and group sizes, 2:4 ones of bfloat16, and 2:4 ones of codes."""
    cases = list(itertools.product((2, 3, 4, 8), group_sizes))
    quantised, sparse = ([Kind(name, *case) for case in cases] for name in ("quant", "sparse24"))
    return [*quantised, Kind("sparse24", None), *sparse]


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def random_weight(key: jax.Array, kind: Kind, inputs: int, outputs: int, arrangement: str) -> Any:
    """A weight of random numbers of about 1 / sqrt(I), made on the device.

    Args:
        key: of the numbers.
        kind: of the weight.
        inputs: I.
        outputs: O.
        arrangement: "rows" or "fragments", see `dispatch.arrangement_of`.
    """
    if kind.bits is None:
        weights = jax.random.normal(key, (inputs, outputs), jnp.bfloat16)
        weights = weights * jnp.bfloat16(inputs**-0.5)
        weights = jnp.where(_kept(inputs, outputs), weights, jnp.bfloat16(0))
        return from_dense(weights, arrangement=arrangement)
    words, scales, zeros = _checkpoint(key, kind.bits, kind.group_size, inputs, outputs)
    if kind.operation == "quant":
        return repack(words, scales, zeros, bits=kind.bits, arrangement=arrangement)
    codes = unpack(words, kind.bits)
    every = jnp.repeat(zeros, inputs // zeros.shape[0], 0)
    words = pack(jnp.where(_kept(inputs, outputs), codes, every), kind.bits)
    return from_codes(words, scales, zeros, bits=kind.bits, arrangement=arrangement)


def abstract_weight(kind: Kind, inputs: int, outputs: int, arrangement: str) -> Any:
    """The same weight, of shapes without values."""
    make = lambda key: random_weight(key, kind, inputs, outputs, arrangement)
    return jax.eval_shape(make, jax.eval_shape(jax.random.key, 0))


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


def multiply(operation: str, backend: str):
    """The product of an operation, "quant" or "sparse24", with its backend bound."""
    product = quant_matmul if operation == "quant" else sparse24_matmul
    return functools.partial(product, backend=backend)


def layer_walk(multiply, weight) -> tuple[Any, Any]:
    """A walk over eight layers as a model has it, for a compiler.

    Args:
        multiply: of (x, weight).
        weight: one layer [N, N], of shapes at least.

    Returns:
        The walk, of (x, stack), and the shapes of the stack.
    """

    def walk(x, stack):
        step = lambda x, layer: (multiply(x, select_layer(stack, layer)), None)
        return jax.lax.scan(step, x, jnp.arange(LAYERS, dtype=jnp.int32))[0]

    return walk, jax.tree.map(lambda a: jax.ShapeDtypeStruct((LAYERS, *a.shape), a.dtype), weight)


def stored_bytes(weight) -> int:
    """Bytes of a weight in memory, or of its shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))
