"""Parameters of a decoder by their path, and decoders with some of them exchanged.

An adapter may bring whole parameters along: biases, norms, an embedding with new rows, a head. The
paths are those of attributes, such as "embedding", "head.kernel" or "layers.q.bias"; what is named
in the layers has all of them stacked. The decoder that is given is left as it is.
"""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from idp_jax.models.decoder import Decoder
from idp_jax.weights import Dense


def parameter(decoder: Decoder, path: str) -> jax.Array:
    """A parameter in float32; the head of a tied model is its embedding, turned."""
    *owners, leaf = path.split(".")
    owner: Any = reduce(getattr, owners, decoder)
    if owner is None:
        return jnp.asarray(decoder.embedding[...], jnp.float32).T
    value = owner.dense() if leaf == "kernel" else getattr(owner, leaf)[...]
    return jnp.asarray(value, jnp.float32)


def with_parameters(decoder: Decoder, values: dict[str, jax.Array]) -> Decoder:
    """The same model with these parameters, in the dtype of its embedding.

    A matrix that is replaced is dense from then on, however it was stored; the head of a tied model
    stands by itself.
    """
    if not values:
        return decoder
    dtype = decoder.embedding.dtype
    copy = jax.tree.map(lambda x: x, decoder)
    for path, value in values.items():
        *owners, leaf = path.split(".")
        value = value.astype(dtype)
        if leaf != "kernel":
            setattr(reduce(getattr, owners, copy), leaf, nnx.data(nnx.Param(value)))
            continue
        *above, name = owners
        owner = reduce(getattr, above, copy)
        old = getattr(owner, name)
        bias = None if old is None or old.bias is None else old.bias[...]
        setattr(owner, name, nnx.data(Dense(value, bias)))
    return copy
