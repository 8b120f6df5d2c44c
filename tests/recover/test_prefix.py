"""A prefix of any form is what it says: deep ones against layers of a reference, projected ones."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idp_jax.config import Init, Prefix, Train
from idp_jax.data.batch import Batch
from idp_jax.inference.generation import generate
from idp_jax.models import KV
from idp_jax.models.cache import concatenate
from idp_jax.recover import PrefixAdapter, Repaired
from idp_jax.recover.methods import METHODS, parameter_count
from idp_jax.recover.prefix import ProjectedPrefix, lengths_by_damage
from idp_jax.recover.starts import Start, first_embeddings
from idp_jax.training import next_token
from idp_jax.training.step import TrainState, make_train_step
from tests.helpers import close, keep, tiny_decoder, tiny_ids

KEY = jax.random.key(3)
MODELS = {
    "llama": lambda: tiny_decoder("llama", num_layers=3),
    "opt": lambda: tiny_decoder("opt", num_layers=3),
}
LENGTHS = (0, 2, 5)


def random_prefix(model, lengths=LENGTHS, seed: int = 0) -> PrefixAdapter:
    """Numbers of one size in every slot, empty ones too: those must not count."""
    config, rng = model.config, np.random.default_rng(seed)
    shape = (2, config.num_layers, max(lengths), config.num_kv_heads, config.head_dim)
    k, v = jnp.asarray(rng.normal(0, 1, shape), jnp.float32)
    return PrefixAdapter(k, v, 0, lengths)


def layer_by_layer(model, adapter: PrefixAdapter, ids, before: int) -> jax.Array:
    """Logits [B, T, V]: every layer's block with keys and values of its own length before it.

    Args:
        before: the position at which the input begins.
    """
    nothing = jnp.zeros((3, 1, 0, model.config.num_kv_heads, model.config.head_dim))
    first = jnp.full((1,), before, jnp.int32)
    moved = KV(nothing, nothing, jnp.zeros((1, 0), bool), first)
    h, context, _ = model.start(model.embed(ids), jnp.ones_like(ids), moved)
    for number, length in enumerate(adapter.lengths or ()):
        block = jax.tree.map(lambda x, number=number: x[number], model.layers)
        k = adapter.k[...][number][None, :length]
        v = adapter.v[...][number][None, :length]
        past = (k, v, jnp.ones((1, length), bool)) if length else None
        h, _ = block(h, context, past)
    return model.logits(model.finish(h))


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_attends_to_its_own_length(name):
    model = MODELS[name]()
    adapter, ids = random_prefix(model), tiny_ids(model, batch=2, time=9)
    found = adapter.repair(model)(ids)
    assert close(found, jax.jit(layer_by_layer, static_argnums=3)(model, adapter, ids, 5), 1e-4)
    full = PrefixAdapter(adapter.k[...], adapter.v[...])
    assert not close(found, full.repair(model)(ids), 0.05)


def test_equal_lengths_are_a_plain_prefix():
    model = MODELS["llama"]()
    deep, ids = random_prefix(model, (4, 4, 4)), tiny_ids(model)
    plain = PrefixAdapter(deep.k[...], deep.v[...])
    assert (deep.repair(model)(ids) == plain.repair(model)(ids)).all()


@pytest.mark.parametrize("name", MODELS)
def test_a_deep_prefix_generates_as_it_scores(name):
    """Token by token through the cache, rows of unequal length, against whole forward passes."""
    model = MODELS[name]()
    repaired = random_prefix(model).repair(model)
    ids = np.array(tiny_ids(model, batch=2, time=6))
    mask = np.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    found = np.asarray(generate(repaired, ids, mask, max_new_tokens=4))
    for row, start in ((0, 0), (1, 2)):
        text = [*ids[row, start:].tolist(), *found[row].tolist()]
        likeliest = np.asarray(repaired([text])[0].argmax(-1))
        assert likeliest[-5:-1].tolist() == found[row].tolist()


def test_masks_of_layers_go_through_every_change_of_a_cache():
    model = MODELS["llama"]()
    prefix = random_prefix(model).repair(model).prefix
    assert prefix is not None
    _, plain = keep(model, tiny_ids(model, batch=2, time=3))
    both = concatenate(prefix, plain)
    expected = np.zeros((3, 2, 8), bool)
    for layer, length in enumerate(LENGTHS):
        expected[layer, :, :length] = True
    expected[..., 5:] = True
    assert (np.asarray(both.mask) == expected).all()
    assert (np.asarray(concatenate(plain, prefix).mask)[:, :, :3]).all()
    roomy = both.reserve(2)
    assert not roomy.mask[..., 8:].any() and roomy.k.shape[2] == 10
    written = roomy.write(plain.replace(mask=plain.mask[:, :2], k=plain.k[:, :, :2]), 8)
    assert written.mask[..., 8:].all() and (written.mask[..., :8] == both.mask).all()
    assert (prefix.repeat(3).mask == prefix.mask).all() and prefix.repeat(3).mask.shape == (3, 3, 5)
    assert (both.rows(jnp.asarray([1, 1, 0])).mask == expected[:, [1, 1, 0]]).all()
    assert (plain.layer_masks() == np.ones((3, 2, 3), bool)).all()


def test_a_pool_of_deep_prefixes_gives_every_row_its_own():
    model = MODELS["llama"]()
    one, two = (random_prefix(model, n, seed=n[0]) for n in ((5, 2, 0), (1, 5, 5)))
    parts = [x.repair(model).prefix for x in (one, two)]
    assert parts[0] is not None and parts[1] is not None
    join = lambda name, axis: jnp.concatenate([getattr(x, name) for x in parts], axis)
    pool = KV(join("k", 1), join("v", 1), join("mask", 1), join("next_position", 0))
    ids = tiny_ids(model, batch=2)
    found = Repaired(model, pool, selector=None)
    logits = found.decoder(ids, past=pool.rows(jnp.asarray([1, 0])))
    assert close(logits[0], two.repair(model)(ids)[0])
    assert close(logits[1], one.repair(model)(ids)[1])


def settings_of(**changes) -> Train:
    """A run's settings for a prefix."""
    return Train(model="m", out=Path("o"), method="prefix", **changes)


def begun(model, **changes):
    """The method's adapter before training."""
    (run,) = METHODS["prefix"].runs(settings_of(**changes))
    return run.init(model, Start(KEY))


def test_layers_begin_with_the_first_tokens_and_count_what_they_have():
    model = MODELS["llama"]()
    deep = begun(model, prefix=Prefix(lengths=LENGTHS), init=Init(frozen_tokens=1))
    assert parameter_count(deep) == (0 + 1 + 4) * 2 * 32
    full = PrefixAdapter.of(model, first_embeddings(model, 5, Start(KEY)))
    for layer, length in enumerate(LENGTHS):
        assert (deep.k[...][layer, :length] == full.k[...][layer, :length]).all()
        assert (deep.v[...][layer, length:] == 0).all()
    with pytest.raises(ValueError, match=r"--prefix\.lengths names 2 layers, and the model has 3"):
        begun(model, prefix=Prefix(lengths=(1, 2)))


def trained(adapter, model, steps: int = 3):
    """An adapter after some steps with weight decay, and the last step's numbers."""
    optimizer = optax.adamw(0.05, weight_decay=0.3)
    with jax.numpy_dtype_promotion("standard"):
        step = make_train_step(optimizer, next_token)
        state = TrainState.start(adapter, optimizer)
        for seed in range(steps):
            state, values = step(state, model, Batch(tiny_ids(model, seed=seed)))
    return state.adapter, values


def test_training_changes_the_slots_that_there_are():
    model = MODELS["llama"]()
    deep = begun(model, prefix=Prefix(lengths=LENGTHS), init=Init(frozen_tokens=1))
    after, _ = trained(deep, model)
    for layer, length in enumerate(LENGTHS):
        old, new = np.asarray(deep.v[...])[layer], np.asarray(after.v[...])[layer]
        assert (old[:1] == new[:1]).all() and (new[length:] == 0).all()
        assert (old[1:length] != new[1:length]).any(-1).all()


@pytest.mark.parametrize("lengths", [(), LENGTHS])
def test_a_projected_prefix_begins_as_the_plain_one_and_is_saved_as_one(lengths):
    model, ids = MODELS["llama"](), tiny_ids(MODELS["llama"]())
    shared = {"prompt_length": 5, "init": Init(frozen_tokens=2)}
    plain = begun(model, prefix=Prefix(lengths=lengths), **shared)
    settings = settings_of(prefix=Prefix(lengths=lengths, projection=7), **shared)
    projected = begun(model, prefix=settings.prefix, **shared)
    assert isinstance(projected, ProjectedPrefix)
    assert (projected.repair(model)(ids) == plain.repair(model)(ids)).all()
    mlp = 5 * 32 + 32 * 7 + 7 + 7 * 3 * 2 * 32 + 3 * 2 * 32
    assert parameter_count(projected) == mlp
    after, _ = trained(projected, model)
    kept = METHODS["prefix"].combine(settings, [after])
    assert type(kept) is PrefixAdapter and jax.tree.structure(kept) == jax.tree.structure(plain)
    assert (kept.repair(model)(ids) == after.repair(model)(ids)).all()
    assert not close(kept.repair(model)(ids), plain.repair(model)(ids), 1e-3)
    moved = np.asarray(kept.k[...] != plain.k[...]).any((-1, -2))
    assert (moved == np.broadcast_to(plain.trained_slots(), moved.shape)).all()
    assert (after.start.k[...] == plain.k[...]).all()


def test_the_mlp_computes_its_formula():
    model = MODELS["opt"]()
    start = PrefixAdapter.init(model, 4, KEY)
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32),
        ProjectedPrefix(start, 6, KEY),
    )
    wide = {
        name: np.asarray(getattr(adapter, name)[...], np.float64)
        for name in ("embeddings", "hidden", "hidden_bias", "output", "output_bias")
    }
    inner = np.tanh(wide["embeddings"] @ wide["hidden"] + wide["hidden_bias"])
    rows = (inner @ wide["output"] + wide["output_bias"]).reshape(4, 3, 2, 4, 16)
    found = adapter.prefix()
    for layer in range(3):
        assert close(
            found.k[...][layer], np.asarray(adapter.start.k[...])[layer] + rows[:, layer, 0]
        )
        assert close(
            found.v[...][layer], np.asarray(adapter.start.v[...])[layer] + rows[:, layer, 1]
        )


@pytest.mark.parametrize(
    ("damage", "mean", "expected"),
    [
        ([1, 1, 1], 4, (4, 4, 4)),
        ([0, 1, 3], 4, (0, 3, 9)),
        ([1, 1, 1, 0], 1, (2, 1, 1, 0)),
        ([0.3, 0.3, 0.4], 1, (1, 1, 1)),
        ([1e-9, 1.0], 2, (0, 4)),
    ],
)
def test_lengths_follow_the_damage(damage, mean, expected):
    assert lengths_by_damage(damage, mean) == expected
    assert sum(expected) == mean * len(damage)


@pytest.mark.parametrize("damage", [[0.0, 0.0], [1.0, float("nan")], [2.0, -1.0]])
def test_no_lengths_follow_from_no_damage(damage):
    with pytest.raises(ValueError, match=r"no lengths follow .* give --prefix\.lengths"):
        lengths_by_damage(damage, 4)
