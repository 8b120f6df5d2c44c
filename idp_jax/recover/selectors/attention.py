"""Scores from attention: pure functions of queries, keys and values, at any layer.

s = q.k / sqrt(D) are logits of the input's queries over a prompt's keys; X are the input's real
rows, L_m is a prompt's length. At layer 0 s hangs on nothing but the input and the prompt; at a
deeper one each prompt's s come from a pass of the input behind it (`ScoreInputs.at`, M passes), and
where a softmax goes over all prompts, those of the other passes stand in it with their own s.

The reference score: A = softmax over {all prompts' keys, the input's own causal keys} of s;
score_m = mean over heads, real input rows and prompt m's columns of A. This reading of
arXiv 2310.00867's "maximal mean attention from the input to the prompt" is ours.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax.recover.selectors.inputs import ScoreInputs

# What hides a logit: finite, because the gradient of a row of nothing but -inf is not a number.
_HIDDEN = -1e30


def attention_scores(
    inputs: ScoreInputs,
    *,
    rows: str = "all",
    columns: str = "mean",
    heads: str = "mean",
    softmax: bool = True,
    layer: int = 0,
    sink: bool = True,
) -> jax.Array:
    """Attention that the input pays to each prompt; the defaults are the reference score.

    Args:
        rows: "all" real tokens of the input, or its "last".
        columns: "mean", "sum" or "max" over the prompt's tokens.
        heads: "mean" or "max".
        softmax: scores after (True) or before (False) the softmax.
        layer: whose attention, see `ScoreInputs.at`.
        sink: False takes every prompt's first key out, as if the prompt did not have it.

    Returns:
        float32 [B, M].
    """
    inputs = _view(inputs, layer, sink)
    to_prompt = _prompt_logits(inputs)
    if softmax:
        to_input = jax.nn.logsumexp(_input_logits(inputs), -1)  # [U, B, N, T]
        # Each prompt's own place for the input gives its own share of the input's keys; the other
        # prompts' keys are common.
        total = jax.nn.logsumexp(to_prompt, (0, -1))
        to_prompt = jnp.exp(to_prompt - jnp.logaddexp(to_input, total[None])[..., None])
    return _over_rows(inputs, _over_columns(inputs, to_prompt, columns), rows, heads)


def free_energy_scores(
    inputs: ScoreInputs,
    *,
    rows: str = "all",
    heads: str = "mean",
    per_token: bool = False,
    layer: int = 0,
    sink: bool = True,
) -> jax.Array:
    """mean_X (LSE_P s_m - LSE_self): the log of the mass on the prompt over that on the input.

    Each prompt stands alone with the input: no other prompt's keys are in its score.

    Args:
        per_token: less log L_m, so that a prompt gains nothing by repeating itself.
        rows, heads, layer, sink: as of `attention_scores`; L_m does not count a sink taken out.

    Returns:
        float32 [B, M].
    """
    inputs = _view(inputs, layer, sink)
    on_input = jax.nn.logsumexp(_input_logits(inputs), -1)
    energy = jax.nn.logsumexp(_prompt_logits(inputs), -1) - on_input  # [M, B, N, T]
    if per_token:
        tokens = jnp.maximum(inputs.prompt_mask.sum(-1), 1).astype(jnp.float32)
        energy = energy - jnp.log(tokens)[:, None, None, None]
    return _over_rows(inputs, energy, rows, heads)


def contribution_scores(
    inputs: ScoreInputs,
    *,
    rows: str = "all",
    heads: str = "mean",
    layer: int = 0,
    sink: bool = True,
) -> jax.Array:
    """mean_X sum_P a |v| max(0, cos(v, o)): what the prompt's values give to the heads' output.

    a is the softmax over the prompt's and the input's keys, o = sum a v over both: each prompt
    stands alone with the input. Source: "Contribution Weights" (arXiv 2606.07604).

    Args:
        rows, heads, layer, sink: as of `attention_scores`.

    Returns:
        float32 [B, M].
    """
    inputs = _view(inputs, layer, sink)
    own_logits = _input_logits(inputs)

    def of_one(prompt: jax.Array) -> jax.Array:
        place = _place(inputs, prompt)
        logits = jnp.concatenate([_one_prompt_logits(inputs, prompt), own_logits[place]], -1)
        weights = jax.nn.softmax(logits, -1)  # [B, N, T, P + T]
        # The values of a kv head serve N / K heads of queries.
        shared = weights.shape[1] // inputs.prompt_values.shape[-2]
        stored = jnp.repeat(inputs.prompt_values[prompt].astype(jnp.float32), shared, -2)
        own = jnp.repeat(inputs.values[place].astype(jnp.float32), shared, -2)
        on_prompt, on_input = jnp.split(weights, [stored.shape[0]], -1)
        output = jnp.einsum("bntp,pnh->bnth", on_prompt, stored)
        output = output + jnp.einsum("bnts,bsnh->bnth", on_input, own)
        # |v| cos(v, o) = v.o / |o|
        along = jnp.einsum("bnth,pnh->bntp", output, stored)
        size = jnp.sqrt(jnp.square(output).sum(-1) + 1e-30)
        return (on_prompt * jnp.maximum(along, 0.0)).sum(-1) / size

    contributions = jax.lax.map(of_one, jnp.arange(inputs.prompt_count))
    return _over_rows(inputs, contributions, rows, heads)


def _view(inputs: ScoreInputs, layer: int, sink: bool) -> ScoreInputs:
    inputs = inputs.at(layer)
    return inputs if sink else inputs.without_sink()


def _place(inputs: ScoreInputs, prompt: jax.Array) -> jax.Array:
    """Which of the U places of the input is the one behind a prompt."""
    return jnp.minimum(prompt, inputs.queries.shape[0] - 1)


def _grouped(queries: jax.Array, kv_heads: int) -> jax.Array:
    shape = queries.shape
    scale = np.float32(shape[-1] ** -0.5)
    grouped = queries.reshape(*shape[:-2], kv_heads, shape[-2] // kv_heads, shape[-1])
    return grouped.astype(jnp.float32) * scale


def _prompt_logits(inputs: ScoreInputs) -> jax.Array:
    """[M, B, N, T, P] logits of every prompt's keys; empty slots are hidden."""
    return jax.vmap(partial(_one_prompt_logits, inputs))(jnp.arange(inputs.prompt_count))


def _one_prompt_logits(inputs: ScoreInputs, prompt: jax.Array) -> jax.Array:
    """[B, N, T, P] logits of one prompt's keys; empty slots are hidden."""
    keys = inputs.prompt_keys[prompt].astype(jnp.float32)
    queries = _grouped(inputs.queries[_place(inputs, prompt)], keys.shape[-2])
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


def _over_columns(inputs: ScoreInputs, weights: jax.Array, columns: str) -> jax.Array:
    """[M, B, N, T, P] -> [M, B, N, T]."""
    mask = inputs.prompt_mask[:, None, None, None, :]
    if columns == "max":
        return jnp.where(mask, weights, -jnp.inf).max(-1)
    total = jnp.where(mask, weights, 0.0).sum(-1)
    tokens = jnp.maximum(mask.sum(-1), 1).astype(jnp.float32)
    return total / tokens if columns == "mean" else total


def _over_rows(inputs: ScoreInputs, weights: jax.Array, rows: str, heads: str) -> jax.Array:
    """[M, B, N, T] -> [B, M]."""
    counted = inputs.real
    if rows == "last":
        last = jnp.max(jnp.where(counted, jnp.arange(counted.shape[1]), -1), -1, keepdims=True)
        counted = jnp.arange(counted.shape[1]) == last
    counted = counted[None, :, None, :]
    number = jnp.maximum(counted.sum(-1), 1).astype(jnp.float32)
    per_head = jnp.where(counted, weights, 0.0).sum(-1) / number
    return (per_head.max(-1) if heads == "max" else per_head.mean(-1)).T


ATTENTION: dict[str, Callable] = {
    "mean_attention": attention_scores,
    "sum_attention": partial(attention_scores, columns="sum"),
    "max_attention": partial(attention_scores, columns="max"),
    "last_token_attention": partial(attention_scores, rows="last"),
    "mean_logit": partial(attention_scores, softmax=False),
    "free_energy": free_energy_scores,
    "free_energy_per_token": partial(free_energy_scores, per_token=True),
    "contribution": contribution_scores,
}
