"""LLaMAs of any size for the benchmarks, built in memory.

The invariant: what the matrices hold is the caller's; the rest is what every LLaMA has.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from idp_jax.models import Decoder, ModelConfig
from idp_jax.models.block import Block
from idp_jax.models.config import RopeConfig
from idp_jax.models.layers import Norm
from idp_jax.weights import Dense


def configuration(
    layers: int, width: int, *, head_dim: int, ffw: int, vocabulary: int, tied: bool
) -> ModelConfig:
    """A LLaMA's configuration, with one key and value head for each query head.

    Args:
        layers: their number.
        width: of the hidden states.
        head_dim: width of a head; a narrower model has one head.
        ffw: width between the MLP's matrices.
        vocabulary: its size.
        tied: whether the head is the embedding.
    """
    heads = max(1, width // head_dim)
    return ModelConfig(
        architecture="llama",
        vocab_size=vocabulary,
        num_layers=layers,
        hidden_dim=width,
        embedding_dim=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        ffw_dim=ffw,
        max_positions=2048,
        activation="silu",
        norm_epsilon=1e-5,
        norm_before=True,
        final_norm=True,
        norm_affine=True,
        attention_bias=False,
        mlp_bias=False,
        tied_embeddings=tied,
        rope=RopeConfig(10000.0, "default"),
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=0,
    )


def decoder(
    config: ModelConfig,
    make: Callable[[jax.Array, int, int], nnx.Module],
    dtype: jax.typing.DTypeLike,
) -> Decoder:
    """A model of random weights.

    Args:
        config: from `configuration`.
        make: of (key, inputs, outputs), one matrix of all layers.
        dtype: of norms, embedding and head.
    """
    width, ffw = config.hidden_dim, config.ffw_dim
    square, wide, narrow = (width, width), (width, ffw), (ffw, width)
    shapes = dict.fromkeys("qkvo", square) | {"gate": wide, "up": wide, "down": narrow}
    keys = jax.random.split(jax.random.key(0), len(shapes) + 2)
    weights = {n: make(k, *s) for k, (n, s) in zip(keys, shapes.items(), strict=False)}
    stacked = jnp.ones((config.num_layers, width), dtype)
    norm = partial(Norm, centred=False, epsilon=config.norm_epsilon)
    head = None
    if not config.tied_embeddings:
        kernel = jax.random.normal(keys[-2], (width, config.vocab_size), dtype)
        head = Dense(kernel * jnp.asarray(width**-0.5, dtype))
    return Decoder(
        config,
        embedding=jax.random.normal(keys[-1], (config.vocab_size, width), dtype),
        layers=Block(weights, norm(stacked), norm(stacked), config),
        final_norm=norm(stacked[0]),
        head=head,
    )
