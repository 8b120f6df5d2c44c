"""What an adapter may be made of before it is trained.

The invariant: a prefix begins as the keys and values of the prompt that begins the same way, so
that before the first step both give the same logits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from idp_jax.config.choices import InitTokens
from idp_jax.models.decoder import Decoder


class Start(NamedTuple):
    """What the beginning of a training has at hand; a method takes what it needs.

    Attributes:
        key: a random key of this training's own.
        text: int32 [P] each, the tokens that this training's prompts are to begin as; as many as
            `Run.text` asks for.
        teacher: the uncompressed model, where `Run.teacher` asks for it.
        windows: int32 [N, T], training text, where `Run.windows` asks for it.
        segments: int32 [N, T], the document of each of its tokens where documents are kept apart.
    """

    key: jax.Array
    text: tuple[jax.Array, ...] = ()
    teacher: Decoder | None = None
    windows: jax.Array | None = None
    segments: jax.Array | None = None


def first_embeddings(
    decoder: Decoder, length: int, start: Start, kind: InitTokens = "vocabulary"
) -> jax.Array:
    """Embeddings that a prompt begins as, float32 [P, E].

    Args:
        kind: "vocabulary": rows of the model's embedding, drawn without repetition; "text": those
            of the first of `start.text`; "random": numbers of a normal distribution with the mean
            and the deviation of the model's embedding; "zeros".

    Raises:
        ValueError: more tokens than positions, or a text of another length.
    """
    config = decoder.config
    if not 0 <= length <= min(config.max_positions, config.vocab_size):
        raise ValueError(
            f"prompt length {length} is out of range; it must lie between 0 and "
            f"{config.max_positions}"
        )
    table, shape = decoder.embedding[...], (length, config.embedding_dim)
    if kind == "zeros":
        return jnp.zeros(shape, jnp.float32)
    if kind == "random":
        mean, deviation = _moments(table)
        return mean + deviation * jax.random.normal(start.key, shape, jnp.float32)
    if kind == "text":
        if not start.text or start.text[0].shape != (length,):
            found = [len(text) for text in start.text]
            raise ValueError(f"a start from text needs {length} tokens of it, not {found}")
        return table[start.text[0]].astype(jnp.float32)
    rows = jax.random.choice(start.key, config.vocab_size, (length,), replace=False)
    return table[rows].astype(jnp.float32)


def _moments(table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of all numbers of [V, E], float32 scalars."""
    table = table.astype(jnp.float32)
    return table.mean(), table.std()
