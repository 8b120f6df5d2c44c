"""A pool chooses per row, by the score that its definition gives, whatever the batch around it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.models.decoder import OPT_POSITION_OFFSET, Decoder
from idp_jax.recover import Pool, Repaired
from idp_jax.recover.selection import find_selector
from idp_jax.recover.selectors import (
    SELECTORS,
    attention_scores,
    fixed_scores,
    layer0_inputs,
    random_scores,
)
from tests.helpers import close, tiny_decoder
from tests.recover.test_adapters import random_prompt, real_logits, rows

POOL = (3, 7, 5)  # tokens of the prompts
LENGTHS = (9, 4, 6, 9, 5, 7, 3, 8)  # tokens of the rows
NAMES = ("llama", "opt")


@functools.cache
def case(name: str) -> tuple[Decoder, Pool, np.ndarray]:
    """A model, a pool and eight rows whose prompts differ."""
    projected = {"embedding_dim": 32} if name == "opt" else {}
    model = tiny_decoder(name, **projected)
    pool = Pool([random_prompt(model, n, seed) for seed, n in enumerate(POOL)])
    ids = np.random.default_rng(4).integers(3, model.config.vocab_size, (len(LENGTHS), 9))
    return model, pool, ids.astype(np.int32)


@functools.cache
def prefix_of(name: str):
    """The stored keys and values of the pool."""
    model, pool, _ = case(name)
    return pool.repair(model).prefix


@functools.partial(jax.jit, static_argnames="score")
def scores_of(model, prefix, ids, mask, score=attention_scores) -> jax.Array:
    """[B, M]."""
    return score(layer0_inputs(model, prefix, ids, mask))


# A slow reference in float64: every prompt and row by itself, without padding.


def normed(h, norm, centred: bool, epsilon: float) -> np.ndarray:
    scale = np.asarray(norm.scale[...], np.float64)[0]
    h = h - h.mean(-1, keepdims=True) if centred else h
    h = h / np.sqrt(np.square(h).mean(-1, keepdims=True) + epsilon) * scale
    return h if norm.bias is None else h + np.asarray(norm.bias[...], np.float64)[0]


def projected(x, weight) -> np.ndarray:
    """x times a matrix of layer 0."""
    y = x @ np.asarray(weight.kernel[...], np.float64)[0]
    return y if weight.bias is None else y + np.asarray(weight.bias[...], np.float64)[0]


def turned(x, positions, theta: float) -> np.ndarray:
    """The rotary embedding of [T, heads, H]: dimension i turns with i + H / 2."""
    half = x.shape[-1] // 2
    angle = positions[:, None] / theta ** (np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def queries_and_keys(model: Decoder, embeddings, first: int):
    """Layer-0 queries and keys [T, N, H] of embeddings [T, E] that start at position `first`."""
    config = model.config
    h, positions = np.asarray(embeddings, np.float64), first + np.arange(len(embeddings))
    if model.project_in is not None:
        h = h @ np.asarray(model.project_in.kernel[...], np.float64)
    if config.rope is None:
        table = np.asarray(model.positions[...], np.float64)
        h = h + table[positions + OPT_POSITION_OFFSET]
    x = normed(h, model.layers.attention_norm, config.rope is None, config.norm_epsilon)
    q = projected(x, model.layers.q).reshape(len(x), config.num_heads, -1)
    k = projected(x, model.layers.k).reshape(len(x), config.num_kv_heads, -1)
    if config.rope is not None:
        q, k = turned(q, positions, config.rope.theta), turned(k, positions, config.rope.theta)
    return q, np.repeat(k, config.num_heads // config.num_kv_heads, 1)


def reference(model, prompts, ids, *, rows="all", columns="mean", heads="mean", softmax=True):
    """Scores [M] of one unpadded row."""
    words = np.asarray(model.embedding[...])[ids]
    hidden = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    to_prompt, own = [], []
    for prompt in prompts:
        _, keys = queries_and_keys(model, np.asarray(prompt), 0)
        q, k = queries_and_keys(model, words, len(prompt))
        scaled = q / np.sqrt(q.shape[-1])
        to_prompt.append(np.einsum("tnh,pnh->ntp", scaled, keys))
        own.append(np.exp(np.einsum("tnh,snh->nts", scaled, k) + hidden).sum(-1))
    total = sum(np.exp(logits).sum(-1) for logits in to_prompt)
    scores = []
    for logits, others in zip(to_prompt, own, strict=True):
        A = np.exp(logits) / (total + others)[..., None] if softmax else logits
        A = getattr(A, columns)(-1)
        A = A[:, -1] if rows == "last" else A.mean(-1)
        scores.append(getattr(A, heads)(0))
    return np.array(scores)


VARIANTS = {
    "reference": {},
    "last-row": {"rows": "last"},
    "sum": {"columns": "sum"},
    "max": {"columns": "max"},
    "best-head": {"heads": "max"},
    "logits": {"softmax": False},
}
VARIANT_SCORES = {name: functools.partial(attention_scores, **v) for name, v in VARIANTS.items()}


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_definition(name):
    model, pool, all_ids = case(name)
    prompts = [prompt.embeddings[...] for prompt in pool.prompts]
    ids, mask = rows(all_ids, LENGTHS, "left")
    every = lambda inputs: {n: score(inputs) for n, score in VARIANT_SCORES.items()}
    found = scores_of(model, prefix_of(name), ids, mask, score=every)
    for variant, settings in VARIANTS.items():
        expected = np.stack(
            [reference(model, prompts, all_ids[i, :n], **settings) for i, n in enumerate(LENGTHS)]
        )
        # Float32 against float64.
        assert close(found[variant], expected, 2e-5 * np.abs(expected).max()), variant
        choice = np.asarray(found[variant]).argmax(-1)
        assert (choice == expected.argmax(-1)).all(), variant
    assert len(set(np.asarray(found["reference"]).argmax(-1).tolist())) > 1  # it is a choice


@pytest.mark.parametrize("name", NAMES)
def test_selection_does_not_depend_on_the_batch(name):
    model, pool, all_ids = case(name)
    repaired = pool.repair(model)
    choose = jax.jit(lambda ids, mask: repaired.choose(ids, mask))
    by_side = {}
    for side in ("left", "right"):
        ids, mask = rows(all_ids, LENGTHS, side)
        by_side[side] = np.asarray(choose(ids, mask))
        assert (np.asarray(choose(ids[::-1], mask[::-1]))[::-1] == by_side[side]).all()
        # Eight times the same row.
        alone = choose(jnp.repeat(ids[1:2], 8, 0), jnp.repeat(mask[1:2], 8, 0))
        assert (np.asarray(alone) == by_side[side][1]).all()
        # What stands in the padding is not read.
        assert (np.asarray(choose(jnp.where(mask > 0, ids, 77), mask)) == by_side[side]).all()
    assert (by_side["left"] == by_side["right"]).all()


@pytest.mark.parametrize("name", NAMES)
def test_answers_do_not_choose_their_prompt(name):
    model, _, all_ids = case(name)
    mask = np.ones_like(all_ids)
    mask[:, 4:6], mask[:, 6:8], mask[:, 8] = 2, 3, 0
    found = scores_of(model, prefix_of(name), all_ids, mask)
    context = np.where(np.arange(9) < 4, 1, 0) * np.ones_like(all_ids)
    assert close(found, scores_of(model, prefix_of(name), all_ids, context), 1e-6)
    other = np.where(mask > 1, 5, all_ids)
    assert close(found, scores_of(model, prefix_of(name), other, mask), 1e-7)
    assert not close(found, scores_of(model, prefix_of(name), all_ids, np.ones_like(mask)), 1e-3)


@jax.jit
def logits_of(repaired: Repaired, ids, mask) -> jax.Array:
    past = repaired.past(ids, mask)
    return repaired.decoder.logits(repaired.decoder.hidden(ids, mask, past=past))


@pytest.mark.parametrize("name", NAMES)
def test_a_chosen_prompt_works_as_it_does_alone(name):
    """Prompts of several lengths in one batch: each row gives its own prompt's logits."""
    model, pool, all_ids = case(name)
    ids, mask = rows(all_ids, LENGTHS, "left")
    alone = [logits_of(prompt.repair(model), ids, mask) for prompt in pool.prompts]
    wanted_row = lambda choice: np.stack([alone[c][i] for i, c in enumerate(np.asarray(choice))])
    mixed = pool.repair(model)
    choice = mixed.choose(ids, mask)
    found = logits_of(mixed, ids, mask)
    assert close(real_logits(found, mask), real_logits(wanted_row(choice), mask), 5e-5)
    # Any other choice, one that a user's own function makes.
    by_length = lambda inputs: -jnp.abs(inputs.real.sum(-1)[:, None] % 3 - jnp.arange(3))
    mixed = Pool(list(pool.prompts), by_length).repair(model)
    choice = mixed.choose(ids, mask)
    assert choice.tolist() == [length % 3 for length in LENGTHS]
    found = logits_of(mixed, ids, mask)
    assert close(real_logits(found, mask), real_logits(wanted_row(choice), mask), 5e-5)
    assert not close(real_logits(alone[0], mask), real_logits(alone[1], mask), 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_every_selector_runs(name):
    model, _, ids = case(name)
    start = (model, len(POOL), jax.random.key(0))
    selectors = {label: find_selector(label, start) for label in SELECTORS}
    every = lambda inputs: {label: score(inputs) for label, score in selectors.items()}
    found = scores_of(model, prefix_of(name), ids, np.ones_like(ids), score=every)
    for label, scores in found.items():
        assert scores.shape == (len(ids), len(POOL)) and np.isfinite(scores).all(), label
    assert (np.asarray(found["first"]).argmax(-1) == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_selector_sees_embeddings(name):
    """Those of the input, and those of the prompts where they stand in the stored prefix."""
    model, pool, all_ids = case(name)
    ids, mask = rows(all_ids, LENGTHS, "left")
    repaired = pool.repair(model)
    inputs = jax.jit(layer0_inputs)(model, repaired.prefix, ids, mask, repaired.prompt_embeddings)
    table = np.asarray(model.embedding[...])
    means = [table[np.asarray(ids)[row, -n:]].mean(0) for row, n in enumerate(LENGTHS)]
    assert (np.asarray(inputs.embeddings) == table[np.asarray(ids)]).all()
    assert close(inputs.mean_embedding(), np.stack(means))
    for number, prompt in enumerate(pool.prompts):
        found = np.asarray(inputs.prompt_embeddings[number])[np.asarray(inputs.prompt_mask)[number]]
        assert (found == np.asarray(prompt.embeddings[...])).all()


@pytest.mark.parametrize("name", NAMES)
def test_scores_have_a_gradient(name):
    """Through padding, and through prompts of several lengths."""
    model, pool, all_ids = case(name)
    ids, mask = rows(all_ids, LENGTHS, "left")

    @jax.jit
    @jax.grad
    def gradient(pool):
        weights = jax.nn.softmax(pool.repair(model).scores(ids, mask) * 100.0)
        return jnp.square(weights).sum()

    for leaf in jax.tree.leaves(gradient(pool)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6


def test_ties_go_to_the_first_prompt():
    model, pool, ids = case("llama")
    same = Pool([pool.prompts[1]] * 3).repair(model)
    assert (np.asarray(same.choose(ids)) == 0).all()


def test_an_empty_prompt_gets_no_attention():
    model, pool, ids = case("llama")
    prefix = Pool([random_prompt(model, 0), pool.prompts[2]]).repair(model).prefix
    found = np.asarray(scores_of(model, prefix, ids, np.ones_like(ids)))
    assert (found[:, 0] == 0).all() and (found[:, 1] > 0).all()


def test_fixed_and_random_controls():
    model, _, ids = case("llama")
    left, mask = rows(ids, LENGTHS, "left")
    right, right_mask = rows(ids, LENGTHS, "right")
    last, drawn = functools.partial(fixed_scores, index=2), functools.partial(random_scores, seed=1)
    score = lambda *batch, kind=random_scores: np.asarray(
        scores_of(model, prefix_of("llama"), *batch, score=kind)
    )
    assert (score(left, mask, kind=last).argmax(-1) == 2).all()
    found = score(left, mask)
    assert (found == score(left, mask)).all()
    # By the row's tokens, not by its place or its padding.
    assert (found == score(right, right_mask)).all()
    assert (found[::-1] == score(left[::-1], mask[::-1])).all()
    assert (found != score(left, mask, kind=drawn)).any()
    assert len(np.unique(found[:, 0])) == len(LENGTHS)


def scan_lengths(jaxpr) -> list[int]:
    """The lengths of all loops of a program, inner ones included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            found.append(equation.params["length"])
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found += scan_lengths(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_is_computed_once(name):
    """Serving goes through the layers with the input only, never with the prompts."""
    model = tiny_decoder(name, num_layers=4)
    pool = Pool([random_prompt(model, n) for n in POOL])
    repaired = jax.eval_shape(lambda: pool.repair(model))
    ids = jax.ShapeDtypeStruct((2, 6), jnp.int32)
    choosing = jax.make_jaxpr(lambda r, ids: r.past(ids, jnp.ones_like(ids)))(repaired, ids)
    serving = jax.make_jaxpr(lambda r, ids: logits_of(r, ids, jnp.ones_like(ids)))(repaired, ids)
    assert 4 not in scan_lengths(choosing.jaxpr)
    assert scan_lengths(serving.jaxpr).count(4) == 1
