"""Scores at every layer, held against a slow forward pass in float64 of [prompt; row]."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.models import KV
from idp_jax.models.block import layer_slice
from idp_jax.models.decoder import OPT_POSITION_OFFSET
from idp_jax.recover import Pool, find_selector
from idp_jax.recover.selectors import (
    ScoreInputs,
    attention_scores,
    certainty_scores,
    contribution_scores,
    free_energy_scores,
    layer0_inputs,
    likelihood_scores,
)
from tests.helpers import close, tiny_decoder
from tests.recover.test_adapters import random_prompt, rows
from tests.recover.test_selectors import turned

POOL, LENGTHS, LAYERS = (3, 6, 4), (7, 3, 5), 3
NAMES = ("llama", pytest.param("opt", marks=pytest.mark.slow))


@functools.cache
def case(name: str):
    """A model of three layers, prompts of three lengths and three rows."""
    model = tiny_decoder(name, num_layers=LAYERS)
    pool = Pool([random_prompt(model, n, seed) for seed, n in enumerate(POOL)])
    ids = np.random.default_rng(2).integers(3, model.config.vocab_size, (len(LENGTHS), 7))
    return model, pool, ids.astype(np.int32)


# The reference.


def normed(h, norm, config) -> np.ndarray:
    """RMSNorm, or LayerNorm."""
    h = h - h.mean(-1, keepdims=True) if config.rope is None else h
    h = h / np.sqrt(np.square(h).mean(-1, keepdims=True) + config.norm_epsilon)
    h = h * np.asarray(norm.scale[...], np.float64)
    return h if norm.bias is None else h + np.asarray(norm.bias[...], np.float64)


def times(x, weight) -> np.ndarray:
    """x through a matrix."""
    y = x @ np.asarray(weight.kernel[...], np.float64)
    return y if weight.bias is None else y + np.asarray(weight.bias[...], np.float64)


def forward(model, prompt, ids) -> tuple[list, np.ndarray]:
    """Of every layer queries, keys, values [P + T, N, H] of [prompt; row]; then logits."""
    config = model.config
    words = np.asarray(model.embedding[...], np.float64)[ids]
    h = np.concatenate([np.asarray(prompt, np.float64), words])
    place = np.arange(len(h))
    if config.rope is None:
        h = h + np.asarray(model.positions[...], np.float64)[place + OPT_POSITION_OFFSET]
    found, hidden = [], np.triu(np.full((len(h), len(h)), -np.inf), 1)
    for layer in range(config.num_layers):
        block = layer_slice(model.layers, layer)
        x = normed(h, block.attention_norm, config)
        split = lambda weight, x=x: times(x, weight).reshape(len(x), -1, config.head_dim)
        q, k, v = split(block.q), split(block.k), split(block.v)
        if config.rope is not None:
            q, k = turned(q, place, config.rope.theta), turned(k, place, config.rope.theta)
        k, v = (np.repeat(y, config.num_heads // config.num_kv_heads, 1) for y in (k, v))
        found.append((q, k, v))
        weights = np.exp(np.einsum("tnh,snh->nts", q, k) / np.sqrt(config.head_dim) + hidden)
        weights /= weights.sum(-1, keepdims=True)
        h = h + times(np.einsum("nts,snh->tnh", weights, v).reshape(len(h), -1), block.o)
        x = normed(h, block.mlp_norm, config)
        if block.gate is None:
            h = h + times(np.maximum(times(x, block.up), 0), block.down)
        else:
            gate = times(x, block.gate)
            h = h + times(gate / (1 + np.exp(-gate)) * times(x, block.up), block.down)
    head = model.embedding[...].T if model.head is None else model.head.kernel[...]
    return found, normed(h, model.final_norm, config) @ np.asarray(head, np.float64)


@functools.cache
def passes(name: str, row: int) -> list:
    """The reference of one row, without padding, behind every prompt."""
    model, pool, ids = case(name)
    return [forward(model, p.embeddings[...], ids[row, : LENGTHS[row]]) for p in pool.prompts]


def exponentials(name: str, row: int, layer: int, sink: bool):
    """exp(s) of the prompts' columns [N, T, P'] and the row's own [N, T, T], by prompt."""
    out = []
    for length, (layers, _) in zip(POOL, passes(name, row), strict=True):
        q, k, v = layers[layer]
        s = np.einsum("tnh,snh->nts", q[length:], k) / np.sqrt(q.shape[-1])
        causal = np.tril(np.ones((LENGTHS[row],) * 2))
        first = 0 if sink else 1
        out.append((np.exp(s[..., first:length]), np.exp(s[..., length:]) * causal, v, first))
    return out


def attention(name, row, layer, sink=True, columns="mean", softmax=True):
    """The reference score."""
    parts = exponentials(name, row, layer, sink)
    total = sum(prompt.sum(-1) for prompt, *_ in parts)
    scores = []
    for prompt, own, *_ in parts:
        weights = prompt / (total + own.sum(-1))[..., None] if softmax else np.log(prompt)
        scores.append(getattr(weights, columns)(-1).mean())
    return scores


def free_energy(name, row, layer, sink=True, per_token=False):
    """Log of mass over mass."""
    parts = exponentials(name, row, layer, sink)
    one = lambda prompt, own: (np.log(prompt.sum(-1)) - np.log(own.sum(-1))).mean()
    return [
        one(prompt, own) - (np.log(prompt.shape[-1]) if per_token else 0)
        for prompt, own, *_ in parts
    ]


def contribution(name, row, layer, sink=True):
    """Attention times norm times cosine."""
    scores = []
    for length, (prompt, own, v, first) in zip(
        POOL, exponentials(name, row, layer, sink), strict=True
    ):
        weights = np.concatenate([prompt, own], -1)
        weights /= weights.sum(-1, keepdims=True)
        v = v[first:]
        out = np.einsum("nts,snh->tnh", weights, v)
        size = np.linalg.norm(v, axis=-1)
        cosine = np.einsum("tnh,snh->nts", out, v)
        cosine /= np.linalg.norm(out, axis=-1).T[..., None] * size.T[:, None]
        given = weights * size.T[:, None] * np.maximum(cosine, 0)
        scores.append(given[..., : length - first].sum(-1).mean())
    return scores


VARIANTS = {
    "mean": (attention_scores, attention, {}),
    "sum": (attention_scores, attention, {"columns": "sum"}),
    "max": (attention_scores, attention, {"columns": "max"}),
    "logit": (attention_scores, attention, {"softmax": False}),
    "max-logit": (attention_scores, attention, {"softmax": False, "columns": "max"}),
    "no-sink": (attention_scores, attention, {"sink": False}),
    "energy": (free_energy_scores, free_energy, {}),
    "energy-per-token": (free_energy_scores, free_energy, {"per_token": True}),
    "energy-no-sink": (free_energy_scores, free_energy, {"per_token": True, "sink": False}),
    "contribution": (contribution_scores, contribution, {}),
    "contribution-no-sink": (contribution_scores, contribution, {"sink": False}),
}


@functools.cache
def found_scores(name: str) -> dict:
    """Every variant at every layer, of padded rows."""
    model, pool, all_ids = case(name)
    ids, mask = rows(all_ids, LENGTHS, "left")

    @jax.jit
    def every(prefix, ids, mask):
        inputs = layer0_inputs(model, prefix, ids, mask)
        return {
            (variant, layer): score(inputs, layer=layer, **options)
            for variant, (score, _, options) in VARIANTS.items()
            for layer in range(LAYERS)
        }

    return every(pool.repair(model).prefix, ids, mask)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_scores_of_a_layer_are_those_of_a_full_pass_behind_the_prompt(name, variant, layer):
    _, reference, options = VARIANTS[variant]
    expected = np.array([reference(name, r, layer, **options) for r in range(len(LENGTHS))])
    found = np.asarray(found_scores(name)[variant, layer])
    # Float32 through three layers against float64.
    assert close(found, expected, 1e-4 * np.abs(expected).max())
    assert np.abs(expected[:, :1] - expected[:, 1:]).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("name", NAMES)
def test_layer_0_is_the_same_bit_for_bit(name):
    model, pool, ids = case(name)
    inputs = jax.jit(layer0_inputs)(model, pool.repair(model).prefix, ids, np.ones_like(ids))
    assert inputs.at(0) is inputs and inputs.at(-LAYERS) is inputs
    assert inputs.at(1).queries.shape[0] == len(POOL)
    assert (np.asarray(inputs.at(-1).keys) == np.asarray(inputs.at(LAYERS - 1).keys)).all()
    with pytest.raises(ValueError, match="layer 3 of a selector is none of the model's 3"):
        inputs.at(3)


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_those_of_full_passes(name):
    model, pool, all_ids = case(name)
    for side in ("left", "right"):
        ids, mask = rows(all_ids, LENGTHS, side)
        inputs = jax.jit(layer0_inputs)(model, pool.repair(model).prefix, ids, mask)
        likelihood, certainty = (
            jax.jit(likelihood_scores)(inputs),
            jax.jit(certainty_scores)(inputs),
        )
        for row, length in enumerate(LENGTHS):
            for number, (_, logits) in enumerate(passes(name, row)):
                own = logits[POOL[number] :]
                log = own - np.log(np.exp(own).sum(-1, keepdims=True))
                picked = log[np.arange(length - 1), all_ids[row, 1:length]].mean()
                assert close(likelihood[row, number], picked, 1e-4)
                assert close(certainty[row, number], (np.exp(log[-1]) * log[-1]).sum(), 1e-4)


def test_mean_hidden_is_that_of_the_input_alone():
    model, pool, all_ids = case("llama")
    ids, mask = rows(all_ids, LENGTHS, "left")
    inputs = jax.jit(layer0_inputs)(model, pool.repair(model).prefix, ids, mask)
    assert close(inputs.mean_hidden(0), inputs.mean_embedding(), 1e-6)
    alone = jax.jit(
        lambda ids: layer0_inputs(model, pool.repair(model).prefix, ids, jnp.ones_like(ids))
    )
    for row, length in enumerate(LENGTHS):
        one = alone(jnp.asarray(all_ids[row : row + 1, :length]))
        assert close(inputs.mean_hidden(2)[row], one.mean_hidden(2)[0], 1e-5)


# Prompts of several lengths.


def planted(lengths, sink: float, inputs: int = 64) -> ScoreInputs:
    """Queries that all like a direction; prompts of the same content again and again.

    Each prompt begins with a key of that direction, as sinks are; what follows repeats five keys,
    of which the second prompt's are what half of the inputs look for, the first's what the rest do.
    """
    rng = np.random.default_rng(0)
    width, longest = 16, max(lengths)
    likes = rng.integers(0, 2, inputs)
    queries = 0.1 * rng.normal(size=(1, inputs, 4, 1, width))
    queries[..., 0] = 4.0
    queries[0, np.arange(inputs), :, 0, 1 + likes] = 8.0
    keys = np.zeros((len(lengths), longest, 1, width))
    mask = np.zeros((len(lengths), longest), bool)
    for number, length in enumerate(lengths):
        content = 0.1 * rng.normal(size=(5, width))
        content[:, 1 + number] = 1.0
        keys[number, -length:, 0] = np.resize(content, (length, width))
        keys[number, -length, 0] = np.eye(width)[0] * sink
        mask[number, -length:] = True
    stored = jnp.asarray(keys[None], jnp.float32)
    prompts = KV(stored, stored, jnp.asarray(mask), jnp.full(len(lengths), longest, jnp.int32))
    single = lambda x: jnp.asarray(x, jnp.float32)
    nothing = jnp.zeros((inputs, 4), jnp.int32)
    own = single(0.1 * rng.normal(size=(1, inputs, 4, 1, width)))
    made = ScoreInputs(
        nothing, nothing == 0, single(likes), single(queries), own, own, prompts, None, None
    )
    return made


def shares(scores) -> np.ndarray:
    """How many rows take each prompt."""
    return np.bincount(np.asarray(scores).argmax(-1), minlength=scores.shape[1])


def test_a_score_that_minds_no_length_chooses_where_the_reference_cannot():
    """Pools of 10 and 50 tokens, each the better one for half of the inputs."""
    inputs = planted((10, 50), sink=8.0)
    assert shares(attention_scores(inputs)).tolist() == [64, 0]
    neutral = free_energy_scores(inputs, per_token=True, sink=False)
    likes = np.asarray(inputs.embeddings).astype(int)
    assert (np.asarray(neutral).argmax(-1) == likes).all() and 16 < likes.sum() < 48


def test_a_prompt_gains_by_repeating_itself_unless_counted_per_token():
    """Free energy rises by log 5 where the same keys stand five times."""
    inputs = planted((5, 25), sink=0.0)
    same = np.resize(np.asarray(inputs.prompts.k[0, 0, -5:]), (25, 1, 16))
    keys = inputs.prompts.k.at[0, 1].set(same)
    inputs = inputs.replace(prompts=inputs.prompts.replace(k=keys))
    plain, counted = (free_energy_scores(inputs, per_token=x) for x in (False, True))
    assert close(plain[:, 1] - plain[:, 0], np.log(5), 1e-5)
    assert close(counted[:, 1], counted[:, 0], 1e-5)


@pytest.mark.parametrize("selector", ["linear_router", "random", "cosine_keys"])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_selector_leaves_aside_is_not_computed(name, selector):
    """Inside a jit: no product with a matrix of the model."""
    model, pool, ids = case(name)
    chosen = find_selector(selector, (model, len(POOL), jax.random.key(0)))
    repaired = pool.repair(model).replace(selector=chosen)
    choose = jax.jit(lambda repaired, ids: repaired.choose(ids)).lower(repaired, ids).compile()
    assert choose.cost_analysis()["flops"] < 2 * ids.size * 64 * 64
