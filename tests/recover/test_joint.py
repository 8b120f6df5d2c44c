"""Prompts and selector trained together: the forward pass of use, and a gradient for the choice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.data.batch import Batch
from idp_jax.models import KV
from idp_jax.recover import Pool, PrefixAdapter, find_selector
from idp_jax.recover.joint import Joint, balance, straight_through, usage_entropy
from idp_jax.training.objectives import next_token
from tests.helpers import close, tiny_decoder, tiny_ids
from tests.recover.test_adapters import random_prompt

NAMES = ("llama", pytest.param("opt", marks=pytest.mark.slow))
KEY = jax.random.key(5)
START, END = jnp.float32(0.0), jnp.float32(1.0)


@functools.cache
def model(name: str = "llama"):
    """A frozen model."""
    return tiny_decoder(name)


def pool(name="llama", selector="linear_router", lengths=(4, 4, 4), **joint) -> Pool:
    """A pool of different prompts."""
    prompts = [random_prompt(model(name), n, seed) for seed, n in enumerate(lengths)]
    return Pool(prompts, find_selector(selector, (model(name), len(lengths), KEY)), Joint(**joint))


def batch(name="llama", rows=8) -> Batch:
    """Some rows of text."""
    return Batch(tiny_ids(model(name), rows, 12))


@jax.jit
def loss(adapter, decoder, batch, share, key=KEY):
    """What a step of training makes smaller."""
    return next_token(adapter.repair_for_training(decoder, share, key), batch)


gradient = jax.jit(jax.grad(lambda *arguments: loss(*arguments)[0]))


@jax.jit
def served(adapter, decoder, tokens, share, key=KEY):
    """What stands before every row of a step, and all the pool's prompts."""
    repaired = adapter.repair_for_training(decoder, share, key)
    return repaired.serve(tokens), repaired.prefix, repaired.scores(tokens)


@pytest.mark.parametrize("selector", ["mean_attention", "linear_router"])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_served_a_stored_prompt_bit_for_bit(name, selector):
    """Also where prompts have several lengths: masks and positions are the chosen one's."""
    before = pool(name, selector, (3, 7, 5))
    (past, _), stored, _ = served(before, model(name), batch(name).tokens, START)
    leaves = lambda kv, row: [kv.k[:, row], kv.v[:, row], kv.mask[row], kv.next_position[row]]
    found = []
    for row in range(8):
        same = [
            all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(*pair, strict=True))
            for pair in ((leaves(past, row), leaves(stored, number)) for number in range(3))
        ]
        assert sum(same) == 1
        found.append(same.index(True))
    assert len(set(found)) > 1


@pytest.mark.parametrize("selector", ["mean_attention", "linear_router"])
def test_at_the_end_training_chooses_as_use_does(selector):
    before = pool(selector=selector, lengths=(3, 7, 5), temperature=(1.0, 1e-4))
    (past, _), stored, scores = served(before, model(), batch().tokens, END)
    chosen = stored.rows(jnp.argmax(scores, -1))
    assert (np.asarray(past.k) == np.asarray(chosen.k)).all()
    use = jax.jit(lambda pool, ids: pool.repair(model()).choose(ids))
    assert (np.asarray(use(before, batch().tokens)) == np.argmax(scores, -1)).all()


def test_the_temperature_falls_geometrically():
    found = [float(Joint(temperature=(2.0, 0.02)).temperature_at(jnp.float32(x))) for x in (0, 0.5)]
    np.testing.assert_allclose(found, [2.0, 0.2], rtol=1e-6)


PARAMETERS = {"mean_attention": 0, "contribution(layer=1)": 0, "linear_router": 2}
PARAMETERS |= {"mlp_router(layer=1, width=8)": 4, "cosine_keys": 1}


@pytest.mark.parametrize("selector", PARAMETERS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_prompts_and_router(name, selector):
    found = gradient(pool(name, selector, (3, 7, 5)), model(name), batch(name), START)
    leaves = jax.tree.leaves(found)
    assert len(leaves) == 3 + PARAMETERS[selector]
    for leaf in leaves:
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6


@pytest.mark.parametrize("mixture", ["gumbel", "soft"])
def test_without_temperature_a_prompt_that_is_not_chosen_has_no_gradient(mixture):
    """Its score hangs on the prompt itself, so at a temperature it does have one."""
    settings = {"selector": "mean_attention", "mixture": mixture, "temperature": (1.0, 1e-5)}
    before, one = pool(**settings, balance=0.0), batch(rows=1)
    chosen = int(before.repair(model()).choose(one.tokens)[0])
    for share, vanishes in ((START, False), (END, True)):
        found = gradient(before, model(), one, share)
        sizes = [float(jnp.abs(prompt.embeddings[...]).max()) for prompt in found.prompts]
        others = [size for number, size in enumerate(sizes) if number != chosen]
        assert (max(others) == 0) == vanishes and (sizes[chosen] > 1e-6 or not vanishes)


def test_the_straight_gradient_is_that_of_the_weighted_sum():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    mask = np.array([[0, 0, 1], [1, 1, 1]], bool)
    prompts = KV(draw(2, 2, 3, 1, 4), draw(2, 2, 3, 1, 4), mask, np.array([3, 3], np.int32))
    prompts = jax.tree.map(jnp.asarray, prompts)
    weights, choice = jnp.asarray([[0.3, 0.7], [0.6, 0.4]], jnp.float32), jnp.asarray([1, 0])
    by_k, by_v = draw(2, 2, 3, 1, 4), draw(2, 2, 3, 1, 4)

    def value(weights):
        past = straight_through(prompts, choice, weights)
        return (past.k * by_k).sum() + (past.v * by_v).sum()

    held = np.where(mask[None, :, :, None, None], 1.0, 0.0)
    expected = np.einsum("lbskh,lmskh->bm", by_k, held * np.asarray(prompts.k, np.float64))
    expected += np.einsum("lbskh,lmskh->bm", by_v, held * np.asarray(prompts.v, np.float64))
    assert close(jax.grad(value)(weights), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("selector", ["linear_router", "cosine_keys(pull=0)"])
def test_the_gradient_of_a_soft_mixture_is_that_of_differences(selector):
    before = pool(selector=selector, mixture="soft", balance=0.0)
    rng = np.random.default_rng(1)
    directed = lambda x: jnp.asarray(rng.normal(size=x.shape).astype(np.float32))
    found = jax.tree.leaves(gradient(before, model(), batch(), START))
    for part in ("prompts", "selector"):
        way = jax.tree.map(jnp.zeros_like, before)
        setattr(way, part, jax.tree.map(directed, getattr(before, part)))
        moved = [jax.tree.map(lambda x, d, s=s: x + s * d, before, way) for s in (2e-3, -2e-3)]
        up, down = (float(loss(adapter, model(), batch(), START)[0]) for adapter in moved)
        slope = sum(float((x * y).sum()) for x, y in zip(found, jax.tree.leaves(way), strict=True))
        # Float32 losses near 6 differ by 5e-7, here divided by 4e-3.
        np.testing.assert_allclose((up - down) / 4e-3, slope, rtol=2e-2, atol=1e-3)


def test_a_soft_mixture_is_the_weighted_sum():
    before = pool(mixture="soft", temperature=(0.5, 0.5))
    (past, _), stored, scores = served(before, model(), batch().tokens, START)
    weights = np.asarray(jax.nn.softmax(scores / 0.5), np.float64)
    for name in ("k", "v"):
        rows = np.einsum("lmskh,bm->lbskh", np.asarray(getattr(stored, name), np.float64), weights)
        assert close(getattr(past, name), rows, 1e-5)


def test_distractors_stand_in_front_and_get_no_gradient():
    before = pool(lengths=(3, 7, 5), distractors=1, balance=0.0)
    one = batch(rows=1)
    (past, _), stored, _ = served(before, model(), one.tokens, START)
    assert past.length == 2 * stored.length
    front, own = np.split(np.asarray(past.k[:, 0]), 2, 1)
    which = lambda found: [(found == np.asarray(stored.k[:, m])).all() for m in range(3)].index(
        True
    )
    assert which(front) != which(own)
    assert (
        np.asarray(past.mask[0]) == np.concatenate(stored.mask[np.r_[which(front), which(own)]])
    ).all()
    found = gradient(before, model(), one, START)
    sizes = [float(jnp.abs(prompt.embeddings[...]).max()) for prompt in found.prompts]
    assert [size > 0 for size in sizes] == [number == which(own) for number in range(3)]
    alone = pool(lengths=(3, 7, 5), balance=0.0)
    assert (
        abs(float(loss(before, model(), one, START)[0] - loss(alone, model(), one, START)[0]))
        > 1e-3
    )


def test_two_distractors_are_two_others():
    before = pool(lengths=(2, 2, 2, 2), distractors=2)
    (past, _), stored, _ = served(before, model(), batch().tokens, START)
    for row in range(8):
        parts = np.split(np.asarray(past.k[:, row]), 3, 1)
        same = lambda part: [(part == np.asarray(stored.k[:, m])).all() for m in range(4)].index(
            True
        )
        assert len({same(part) for part in parts}) == 3


def test_the_balance_is_least_where_all_are_used_alike():
    even, all_one = np.full((4, 4), 0.25, np.float32), np.eye(4, dtype=np.float32)[[1] * 4]
    assert float(balance(jnp.asarray(even), jnp.eye(4))) == 1.0
    assert float(balance(jnp.asarray(all_one), jnp.asarray(all_one))) == 4.0
    np.testing.assert_allclose(float(usage_entropy(jnp.eye(4))), np.log(4), rtol=1e-6)
    assert float(usage_entropy(jnp.asarray(all_one))) == 0.0


def test_the_loss_has_the_balance_and_not_the_entropy():
    with_it, parts = loss(pool(balance=0.5), model(), batch(), START)
    without, others = loss(pool(balance=0.0), model(), batch(), START)
    assert close(with_it - without, parts["balance"], 1e-6) and float(others["balance"]) == 0
    assert float(parts["usage_entropy"]) > 0


def test_a_module_adds_a_penalty_of_its_own():
    before = pool(selector="cosine_keys(pull=2.0)", balance=0.0)
    value, parts = loss(before, model(), batch(), START)
    (_, penalties), _, scores = served(before, model(), batch().tokens, START)
    assert 0 < float(parts["pull"]) <= 4 and close(penalties["pull"], parts["pull"], 1e-5)
    other = pool(selector="cosine_keys(pull=0.0)", balance=0.0)
    assert close(value - loss(other, model(), batch(), START)[0], parts["pull"], 1e-5)
    assert np.abs(scores).max() <= 1.0001


def test_noise_hangs_on_the_key_alone():
    first, again = (loss(pool(), model(), batch(), START, KEY)[0] for _ in range(2))
    assert first == again
    others = {float(loss(pool(), model(), batch(), START, jax.random.key(n))[0]) for n in range(4)}
    assert len(others) > 1


def test_a_pool_of_prefixes_trains_jointly_too():
    prefixes = [PrefixAdapter.init(model(), 3, jax.random.key(n)) for n in range(2)]
    router = find_selector("linear_router", (model(), 2, KEY))
    found = gradient(Pool(prefixes, router, Joint()), model(), batch(), START)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))
    with pytest.raises(ValueError, match=r"must have one length, not \[3, 4\]"):
        Pool([prefixes[0], PrefixAdapter.init(model(), 4, KEY)])
    with pytest.raises(ValueError, match="of one kind, not"):
        Pool([prefixes[0], random_prompt(model(), 3)])


REFUSED = {
    "soft": ({"mixture": "soft"}, (3, 4), r"soft adds up prompts .*\[3, 4\] differ"),
    "many": ({"distractors": 2}, (3, 4), "2 are not fewer than the 2 prompts .*give 1 at most"),
    "both": ({"mixture": "soft", "distractors": 1}, (3, 3), "a soft mixture has no other prompts"),
}


@pytest.mark.parametrize(("joint", "lengths", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_jointly_is_refused(joint, lengths, message):
    with pytest.raises(ValueError, match=message):
        pool(lengths=lengths, **joint)
