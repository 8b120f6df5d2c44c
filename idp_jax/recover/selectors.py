"""How a pool's prompt is chosen: pure functions from layer-0 attention to one score per prompt.

A selector takes `ScoreInputs` and returns scores [B, M]; the largest wins, ties go to the lowest
index. Layer 0 is exact: its keys depend on
the prompt embeddings alone, so no prompt's score is touched by another's. To try your own, pass any
function of this signature to
`Pool(..., selector=...)` or add it to `SELECTORS`.

The reference score: A = softmax over {all prompts' keys, the input's own causal keys} of q.k /
sqrt(D);
score_i = mean over heads, real input rows and prompt i's columns of A. This reading of arXiv
2310.00867's "maximal mean attention from
the input to the prompt" is ours.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from idp_jax.models.cache import KV
from idp_jax.models.decoder import Decoder


class ScoreInputs(struct.PyTreeNode):
    """What a selector may look at.

    U is 1 where the input stands at the same position behind every prompt, and M where each prompt
    puts it elsewhere (learned
    positions and prompts of several lengths).

    Attributes:
        input_ids: int32 [B, T].
        real: bool [B, T]: tokens that count (not padding, not an answer under test).
        queries: [U, B, T, N, H] layer-0 queries after RoPE.
        keys: [U, B, T, K, H] the input's own layer-0 keys.
        prompt_keys: [M, P, K, H] layer-0 keys of every prompt.
        prompt_mask: bool [M, P].
    """

    input_ids: jax.Array
    real: jax.Array
    queries: jax.Array
    keys: jax.Array
    prompt_keys: jax.Array
    prompt_mask: jax.Array


Selector = Callable[[ScoreInputs], jax.Array]


def layer0_inputs(decoder: Decoder, prompts: KV, input_ids, attention_mask) -> ScoreInputs:
    """Computes layer-0 queries and keys of the input as it would stand behind the prompts.

    Args:
        prompts: the pool, one prompt per row.
        attention_mask: int [B, T]; only tokens marked 1 count (see `layers.visibility`).
    """
    shared = decoder.config.rope is not None  # pools of rotary models are right-aligned
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
    return ScoreInputs(input_ids, real, queries, keys, prompts.k[0], prompts.mask)


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
        own = jax.nn.logsumexp(_own_logits(inputs), -1)  # [U, B, N, T]
        # Each prompt's own place for the input gives its own share of the input's keys; the other
        # prompts' keys are common.
        total = jax.nn.logsumexp(to_prompt, (0, -1))
        to_prompt = jnp.exp(to_prompt - jnp.logaddexp(own, total[None])[..., None])
    return _reduce(inputs, to_prompt, rows, columns, heads)


def _grouped(queries: jax.Array, kv_heads: int) -> jax.Array:
    shape = queries.shape
    scale = np.float32(shape[-1] ** -0.5)
    grouped = queries.reshape(*shape[:-2], kv_heads, shape[-2] // kv_heads, shape[-1])
    return grouped.astype(jnp.float32) * scale


def _one_prompt_logits(inputs: ScoreInputs, prompt: jax.Array) -> jax.Array:
    """[B, N, T, P] logits of one prompt's keys; empty slots are -inf."""
    place = jnp.minimum(prompt, inputs.queries.shape[0] - 1)
    keys = inputs.prompt_keys[prompt].astype(jnp.float32)
    queries = _grouped(inputs.queries[place], keys.shape[-2])
    logits = jnp.einsum("btkgh,pkh->bkgtp", queries, keys)
    logits = logits.reshape(logits.shape[0], -1, *logits.shape[3:])
    return jnp.where(inputs.prompt_mask[prompt], logits, -jnp.inf)


def _own_logits(inputs: ScoreInputs) -> jax.Array:
    """[U, B, N, T, T] causal logits of the input's own keys; hidden ones are -inf."""
    keys = inputs.keys.astype(jnp.float32)
    queries = _grouped(inputs.queries, keys.shape[-2])
    logits = jnp.einsum("ubtkgh,ubskh->ubkgts", queries, keys)
    logits = logits.reshape(*logits.shape[:2], -1, *logits.shape[4:])
    causal = jnp.tril(jnp.ones(logits.shape[-2:], bool)) & inputs.real[:, None, None, :]
    return jnp.where(causal, logits, -jnp.inf)


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
    """A control: scores drawn from the seed and the row's own tokens, whatever the batch around
    it.
    """
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


SELECTORS: dict[str, Selector] = {
    "mean_attention": attention_scores,
    "sum_attention": partial(attention_scores, columns="sum"),
    "max_attention": partial(attention_scores, columns="max"),
    "last_token_attention": partial(attention_scores, rows="last"),
    "mean_logit": partial(attention_scores, softmax=False),
    "random": random_scores,
    "first": fixed_scores,
}


def selector(name: str) -> Selector:
    """A selector by name.

    Raises:
        ValueError: no such selector.
    """
    if name not in SELECTORS:
        raise ValueError(f"no selector {name!r}; there are {', '.join(SELECTORS)}")
    return SELECTORS[name]
