"""What a pool's prompts are scored by: functions and modules from layer-0 attention to [B, M].

A selector takes `ScoreInputs` and returns one score per row and prompt; which prompt the scores
choose is settled elsewhere (`Repaired.choose`: the largest, ties to the lowest index). It is a
plain function, or an nnx module whose parameters are trained and saved with the pool. Layer 0 is
exact: its keys depend on the prompts' embeddings alone, so no prompt's score is touched by
another's.

The reference score: A = softmax over {all prompts' keys, the input's own causal keys} of
q.k / sqrt(D); score_i = mean over heads, real input rows and prompt i's columns of A. This reading
of arXiv 2310.00867's "maximal mean attention from the input to the prompt" is ours.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from idp_jax.models.cache import KV
from idp_jax.models.decoder import Decoder

# What hides a logit: finite, because the gradient of a row of nothing but -inf is not a number.
_HIDDEN = -1e30


class ScoreInputs(struct.PyTreeNode):
    """What a selector may look at; inside a jit, what it leaves aside is not computed.

    U is 1 where the input stands at the same position behind every prompt, and M where each prompt
    puts it elsewhere (learned positions and prompts of several lengths). A selector that needs more
    than layer 0 runs `decoder` behind `prompts.rows(...)` itself.

    Attributes:
        input_ids: int32 [B, T].
        real: bool [B, T]: tokens that count (not padding, not an answer under test).
        embeddings: [B, T, E] of the input's tokens.
        queries: [U, B, T, N, H] layer-0 queries after RoPE.
        keys: [U, B, T, K, H] the input's own layer-0 keys.
        prompts: the pool's stored keys and values of every layer, one prompt per row.
        prompt_embeddings: [M, P, E], empty slots where `prompt_mask` is False; None for a pool that
            is no more than keys and values.
        decoder: the model.
    """

    input_ids: jax.Array
    real: jax.Array
    embeddings: jax.Array
    queries: jax.Array
    keys: jax.Array
    prompts: KV
    prompt_embeddings: jax.Array | None
    decoder: Decoder

    @property
    def prompt_keys(self) -> jax.Array:
        """Layer-0 keys of every prompt, [M, P, K, H]."""
        return self.prompts.k[0]

    @property
    def prompt_mask(self) -> jax.Array:
        """Slots that hold a prompt's token in layer 0, bool [M, P]."""
        return self.prompts.mask if self.prompts.mask.ndim == 2 else self.prompts.mask[0]

    def mean_embedding(self) -> jax.Array:
        """The mean embedding of each row's real tokens, float32 [B, E]."""
        counted = self.real[..., None]
        total = jnp.where(counted, self.embeddings.astype(jnp.float32), 0.0).sum(1)
        return total / jnp.maximum(counted.sum(1), 1).astype(jnp.float32)


class Selector(Protocol):
    """A function, or an nnx module, that scores a pool's prompts."""

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
    """Computes layer-0 queries and keys of the input as it would stand behind the prompts.

    Args:
        prompts: the pool, one prompt per row.
        input_ids: int32 [B, T].
        attention_mask: int [B, T]; only tokens marked 1 count (see `layers.visibility`).
        prompt_embeddings: [M, P, E], where they are known.
    """
    # Pools of rotary models are right-aligned, so the input stands at one place behind all of them.
    shared = decoder.config.rope is not None
    offsets = prompts.next_position[:1] if shared else prompts.next_position
    block = jax.tree.map(lambda x: x[0], decoder.layers)
    embeddings = decoder.embed(input_ids)
    real = attention_mask == 1

    def behind(offset):
        nothing = prompts.rows(jnp.zeros((1,), jnp.int32)).replace(next_position=offset[None])
        h, context, _ = decoder.start(embeddings, real.astype(jnp.int32), nothing)
        queries, keys, _ = block.heads(block.attention_input(h), context)
        return queries, keys

    queries, keys = jax.lax.map(behind, offsets)
    return ScoreInputs(
        input_ids, real, embeddings, queries, keys, prompts, prompt_embeddings, decoder
    )


def attention_scores(
    inputs: ScoreInputs,
    *,
    rows: str = "all",
    columns: str = "mean",
    heads: str = "mean",
    softmax: bool = True,
) -> jax.Array:
    """Attention that the input pays to each prompt; the defaults are the reference score.

    Args:
        rows: "all" real tokens of the input, or its "last".
        columns: "mean", "sum" or "max" over the prompt's tokens.
        heads: "mean" or "max".
        softmax: scores after (True) or before (False) the softmax.

    Returns:
        float32 [B, M].
    """
    prompt_count = inputs.prompt_mask.shape[0]
    per_prompt = jax.vmap(partial(_one_prompt_logits, inputs))
    to_prompt = per_prompt(jnp.arange(prompt_count))  # [M, B, N, T, P]
    if softmax:
        to_input = jax.nn.logsumexp(_input_logits(inputs), -1)  # [U, B, N, T]
        # Each prompt's own place for the input gives its own share of the input's keys; the other
        # prompts' keys are common.
        total = jax.nn.logsumexp(to_prompt, (0, -1))
        to_prompt = jnp.exp(to_prompt - jnp.logaddexp(to_input, total[None])[..., None])
    return _reduce(inputs, to_prompt, rows, columns, heads)


def _grouped(queries: jax.Array, kv_heads: int) -> jax.Array:
    shape = queries.shape
    scale = np.float32(shape[-1] ** -0.5)
    grouped = queries.reshape(*shape[:-2], kv_heads, shape[-2] // kv_heads, shape[-1])
    return grouped.astype(jnp.float32) * scale


def _one_prompt_logits(inputs: ScoreInputs, prompt: jax.Array) -> jax.Array:
    """[B, N, T, P] logits of one prompt's keys; empty slots are hidden."""
    place = jnp.minimum(prompt, inputs.queries.shape[0] - 1)
    keys = inputs.prompt_keys[prompt].astype(jnp.float32)
    queries = _grouped(inputs.queries[place], keys.shape[-2])
    logits = jnp.einsum("btkgh,pkh->bkgtp", queries, keys)
    logits = logits.reshape(logits.shape[0], -1, *logits.shape[3:])
    return jnp.where(inputs.prompt_mask[prompt], logits, _HIDDEN)


def _input_logits(inputs: ScoreInputs) -> jax.Array:
    """[U, B, N, T, T] causal logits of the input's own keys; later ones are hidden."""
    keys = inputs.keys.astype(jnp.float32)
    queries = _grouped(inputs.queries, keys.shape[-2])
    logits = jnp.einsum("ubtkgh,ubskh->ubkgts", queries, keys)
    logits = logits.reshape(*logits.shape[:2], -1, *logits.shape[4:])
    causal = jnp.tril(jnp.ones(logits.shape[-2:], bool)) & inputs.real[:, None, None, :]
    return jnp.where(causal, logits, _HIDDEN)


def _reduce(
    inputs: ScoreInputs, weights: jax.Array, rows: str, columns: str, heads: str
) -> jax.Array:
    """[M, B, N, T, P] -> [B, M]."""
    mask = inputs.prompt_mask[:, None, None, None, :]
    if columns == "max":
        weights = jnp.where(mask, weights, -jnp.inf).max(-1)
    else:
        total = jnp.where(mask, weights, 0.0).sum(-1)
        tokens = jnp.maximum(mask.sum(-1), 1).astype(jnp.float32)
        weights = total / tokens if columns == "mean" else total
    counted = inputs.real
    if rows == "last":
        last = jnp.max(jnp.where(counted, jnp.arange(counted.shape[1]), -1), -1, keepdims=True)
        counted = jnp.arange(counted.shape[1]) == last
    counted = counted[None, :, None, :]
    number = jnp.maximum(counted.sum(-1), 1).astype(jnp.float32)
    per_head = jnp.where(counted, weights, 0.0).sum(-1) / number
    return (per_head.max(-1) if heads == "max" else per_head.mean(-1)).T


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
    """A control: prompt `index` for every input."""
    chosen = jnp.arange(inputs.prompt_mask.shape[0]) == index
    return jnp.broadcast_to(chosen.astype(jnp.float32), (inputs.real.shape[0], chosen.size))


class LinearRouter(nnx.Module):
    """A linear map from the input's mean embedding to a score per prompt, trained with the pool.

    Source: "SMoP: Towards Efficient and Effective Prompt Tuning with Sparse Mixture-of-Prompts".
    """

    def __init__(self, decoder: Decoder, prompts: int, key: jax.Array):
        width = decoder.config.embedding_dim
        self.weight = nnx.Param(jax.random.normal(key, (width, prompts), jnp.float32) * width**-0.5)
        self.bias = nnx.Param(jnp.zeros((prompts,), jnp.float32))

    def __call__(self, inputs: ScoreInputs) -> jax.Array:
        """Scores [B, M]."""
        return inputs.mean_embedding() @ self.weight[...] + self.bias[...]


SELECTORS: dict[str, Callable] = {
    "mean_attention": attention_scores,
    "sum_attention": partial(attention_scores, columns="sum"),
    "max_attention": partial(attention_scores, columns="max"),
    "last_token_attention": partial(attention_scores, rows="last"),
    "mean_logit": partial(attention_scores, softmax=False),
    "linear_router": LinearRouter,
    "random": random_scores,
    "fixed": fixed_scores,
    "first": partial(fixed_scores, index=0),
}
