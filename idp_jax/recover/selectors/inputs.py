"""What a selector may look at: the input as it stands behind every prompt of a pool.

The invariant: at every layer queries, keys and values are those of a forward pass of the input
behind that prompt. At layer 0 they hang on the input's place alone, so one computation may serve
all prompts; a deeper layer has one pass for each prompt, through the layers before it.
"""

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct

from idp_jax.models.block import layer_slice
from idp_jax.models.cache import KV
from idp_jax.models.decoder import Decoder


class ScoreInputs(struct.PyTreeNode):
    """What a selector may look at; inside a jit, what it leaves aside is not computed.

    U is 1 where the input stands at the same position behind every prompt, and M where each prompt
    puts it elsewhere (learned positions and prompts of several lengths), or at a deeper layer. What
    needs more than attention, such as logits, runs `decoder` behind `prompts.rows(...)` itself.

    Attributes:
        input_ids: int32 [B, T].
        real: bool [B, T]: tokens that count (not padding, not an answer under test).
        embeddings: [B, T, E] of the input's tokens.
        queries: [U, B, T, N, H] queries of `layer` after RoPE.
        keys: [U, B, T, K, H] the input's own keys of that layer.
        values: [U, B, T, K, H] its values.
        prompts: the pool's stored keys and values of every layer, one prompt per row.
        prompt_embeddings: [M, P, E], empty slots where `prompt_mask` is False; None for a pool that
            is no more than keys and values.
        decoder: the model.
        layer: whose queries, keys and values these are.
    """

    input_ids: jax.Array
    real: jax.Array
    embeddings: jax.Array
    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    prompts: KV
    prompt_embeddings: jax.Array | None
    decoder: Decoder
    layer: int = struct.field(pytree_node=False, default=0)

    @property
    def prompt_keys(self) -> jax.Array:
        """Keys of every prompt at this layer, [M, P, K, H]."""
        return self.prompts.k[self.layer]

    @property
    def prompt_values(self) -> jax.Array:
        """Values of every prompt at this layer, [M, P, K, H]."""
        return self.prompts.v[self.layer]

    @property
    def prompt_mask(self) -> jax.Array:
        """Slots that hold a prompt's token, bool [M, P]."""
        mask = self.prompts.mask
        return mask if mask.ndim == 2 else mask[self.layer]

    @property
    def prompt_count(self) -> int:
        """The number of prompts M."""
        return self.prompts.batch

    def at(self, layer: int) -> "ScoreInputs":
        """The same at another layer, by M passes through the layers before it.

        Args:
            layer: 0 to L - 1, or from the end below 0.

        Raises:
            ValueError: the model has no such layer.
        """
        if layer == self.layer:
            return self
        layers = self.decoder.config.num_layers
        if not -layers <= layer < layers:
            raise ValueError(
                f"layer {layer} of a selector is none of the model's {layers}; give 0 to "
                f"{layers - 1}"
            )
        if layer < 0:
            return self.at(layer + layers)
        mask = self.real.astype(jnp.int32)

        # Of a backward pass, one prompt's activations are held at a time.
        @partial(jax.checkpoint, prevent_cse=False)
        def behind(prompt: jax.Array):
            past = self.prompts.rows(prompt[None])
            return _heads(self.decoder, self.embeddings, mask, past, layer)

        queries, keys, values = jax.lax.map(behind, jnp.arange(self.prompt_count))
        return self.replace(queries=queries, keys=keys, values=values, layer=layer)

    def without_sink(self) -> "ScoreInputs":
        """The same, with the first key of every prompt taken for an empty slot.

        The passes behind `at` still see it: what is left out is its part in a score.
        """
        mask = self.prompt_mask
        first = mask & (jnp.cumsum(mask, -1) == 1)
        return self.replace(prompts=self.prompts.replace(mask=mask & ~first))

    def mean_embedding(self) -> jax.Array:
        """The mean embedding of each row's real tokens, float32 [B, E]."""
        return self._mean(self.embeddings)

    def mean_hidden(self, layer: int) -> jax.Array:
        """The mean of what enters a layer at each row's real tokens, float32 [B, D].

        The input stands alone here, without a prompt: one pass through the layers before.
        """
        mask = self.real.astype(jnp.int32)
        return self._mean(_hidden(self.decoder, self.embeddings, mask, None, layer)[0])

    def _mean(self, tokens: jax.Array) -> jax.Array:
        counted = self.real[..., None]
        total = jnp.where(counted, tokens.astype(jnp.float32), 0.0).sum(1)
        return total / jnp.maximum(counted.sum(1), 1).astype(jnp.float32)


class Selector(Protocol):
    """A function, or an nnx module, that scores a pool's prompts.

    A module may have `penalties(inputs, load)`, float32 scalars by name that joint training adds to
    the loss (load: [B, M], what each row takes of each prompt); and `fitted(repaired, windows)`,
    which returns the module as it follows from a trained pool and training text [N, T]: such a one
    is not trained.
    """

    def __call__(self, inputs: ScoreInputs, /) -> jax.Array:
        """Scores [B, M]; the prompt with the largest serves the row."""
        ...


def layer0_inputs(
    decoder: Decoder,
    prompts: KV,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    prompt_embeddings: jax.Array | None = None,
) -> ScoreInputs:
    """Computes layer-0 queries, keys and values of the input as it would stand behind the prompts.

    Args:
        prompts: the pool, one prompt per row.
        input_ids: int32 [B, T].
        attention_mask: int [B, T]; only tokens marked 1 count (see `layers.visibility`).
        prompt_embeddings: [M, P, E], where they are known.
    """
    # Pools of rotary models are right-aligned, so the input stands at one place behind all of them.
    shared = decoder.config.rope is not None
    offsets = prompts.next_position[:1] if shared else prompts.next_position
    embeddings = decoder.embed(input_ids)
    real = attention_mask == 1

    def behind(offset: jax.Array):
        nothing = prompts.rows(jnp.zeros((1,), jnp.int32)).replace(next_position=offset[None])
        return _heads(decoder, embeddings, real.astype(jnp.int32), nothing, 0)

    queries, keys, values = jax.lax.map(behind, offsets)
    return ScoreInputs(
        input_ids, real, embeddings, queries, keys, values, prompts, prompt_embeddings, decoder
    )


def _heads(decoder: Decoder, embeddings, mask, past: KV, layer: int):
    """Queries [B, T, N, H], keys and values [B, T, K, H] of the input at a layer, behind `past`."""
    h, context = _hidden(decoder, embeddings, mask, past, layer)
    block = layer_slice(decoder.layers, layer)
    return block.heads(block.attention_input(h), context)


def _hidden(decoder: Decoder, embeddings, mask, past: KV | None, layer: int):
    """What enters a layer, [B, T, D], and the context."""
    h, context, _ = decoder.start(embeddings, mask, past)
    if layer:
        kept = None if past is None else (past.k, past.v, past.layer_masks())

        def step(number: jax.Array, h: jax.Array) -> jax.Array:
            stored = jax.tree.map(lambda x: x[number], kept)
            return layer_slice(decoder.layers, number)(h, context, stored)[0]

        h = jax.lax.fori_loop(0, layer, step, h)
    return h, context
