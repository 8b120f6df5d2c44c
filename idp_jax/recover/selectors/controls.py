"""Selectors that do not look at what the prompts are: what others are compared with."""

import jax
import jax.numpy as jnp

from idp_jax.recover.selectors.inputs import ScoreInputs


def random_scores(inputs: ScoreInputs, *, seed: int = 0) -> jax.Array:
    """A control: scores drawn from the seed and the row's tokens, whatever the batch around it."""
    place = jnp.cumsum(inputs.real, -1, dtype=jnp.uint32)
    words = inputs.input_ids.astype(jnp.uint32) * jnp.uint32(2654435761) + place
    row_hash = jnp.where(inputs.real, words * words, jnp.uint32(0)).sum(-1, dtype=jnp.uint32)
    prompts = inputs.prompt_mask.shape[0]

    def draw(word):
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), word), (prompts,))

    return jax.vmap(draw)(row_hash)


def fixed_scores(inputs: ScoreInputs, *, index: int = 0) -> jax.Array:
    """A control: prompt `index` for every input; ValueError where the pool has none such."""
    prompts = inputs.prompt_mask.shape[0]
    if not 0 <= index < prompts:
        raise ValueError(f"fixed(index={index}): the pool has {prompts} prompts; the first is 0")
    chosen = jnp.arange(prompts) == index
    return jnp.broadcast_to(chosen.astype(jnp.float32), (inputs.real.shape[0], chosen.size))
