"""Scores from what the model says behind each prompt: M passes through the whole model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from idp_jax.models.likelihood import token_scores
from idp_jax.recover.selectors.inputs import ScoreInputs


def likelihood_scores(inputs: ScoreInputs) -> jax.Array:
    """The mean log-probability of the input's own tokens behind each prompt, float32 [B, M].

    Where the input is the very text that is scored (perplexity), that is the oracle.
    """
    counted = inputs.real[:, :-1] & inputs.real[:, 1:]
    number = jnp.maximum(counted.sum(-1), 1).astype(jnp.float32)

    def of_one(hidden: jax.Array) -> jax.Array:
        targets = inputs.input_ids[:, 1:]
        found = token_scores(inputs.decoder, hidden[:, :-1], targets)[0]
        return jnp.where(counted, found, 0.0).sum(-1) / number

    return _behind_each(inputs, of_one)


def certainty_scores(inputs: ScoreInputs) -> jax.Array:
    """Minus the entropy of the token that follows the input behind each prompt, float32 [B, M]."""
    last = jnp.max(jnp.where(inputs.real, jnp.arange(inputs.real.shape[1]), 0), -1)

    def of_one(hidden: jax.Array) -> jax.Array:
        end = jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0]
        likelihood = jax.nn.log_softmax(inputs.decoder.logits(end))
        return (jnp.exp(likelihood) * likelihood).sum(-1)

    return _behind_each(inputs, of_one)


def _behind_each(inputs: ScoreInputs, of_one: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`of_one` of the last hidden states [B, T, E] behind every prompt, as [B, M]."""
    mask = inputs.real.astype(jnp.int32)

    def behind(prompt: jax.Array) -> jax.Array:
        past = inputs.prompts.rows(prompt[None])
        return of_one(inputs.decoder.hidden(None, mask, embeddings=inputs.embeddings, past=past))

    return jax.lax.map(behind, jnp.arange(inputs.prompt_count)).T
