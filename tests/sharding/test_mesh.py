"""Eight devices compute what one computes, and each holds its part only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from idp_jax import load_model
from idp_jax.models.decoder import _logits
from idp_jax.models.embedding import rows_of
from idp_jax.sharding import constrain, make_mesh, shard, shard_batch, spec
from tests.helpers import close, quantize_decoder, tiny_decoder, tiny_folder, tiny_ids

MESHES = {
    "2x2x2": {"data": 2, "fsdp": 2, "model": 2},
    "1x1x8": {"model": 8},
    "8x1x1": {"data": 8},
    "1x8x1": {"fsdp": 8},
}
# Partial sums of several devices are added in another order.
TOLERANCE = 1e-5
MODELS = {
    # Two kv heads on up to eight devices of `model`: k and v stay whole where they do not divide.
    "llama": lambda: tiny_decoder("llama", attention_bias=True),
    "opt": lambda: tiny_decoder("opt", embedding_dim=32),
    "llama-packed": lambda: quantize_decoder(tiny_decoder("llama", mlp_bias=True), 4),
    "llama-act-order": lambda: quantize_decoder(tiny_decoder("llama"), 4, act_order=True),
}


# Dense models on every mesh, the others where words and groups are cut.
COMBINATIONS = [(model, mesh) for model in ("llama", "opt") for mesh in MESHES] + [
    ("llama-packed", "1x1x8"),
    ("llama-act-order", "2x2x2"),
]


@functools.cache
def batch_and_logits(name):
    """A model, a batch with padding, and the logits on one device."""
    model = MODELS[name]()
    ids = tiny_ids(model, batch=8, time=10)
    mask = jnp.ones_like(ids).at[1, :3].set(0).at[2, 6:].set(0)
    return model, ids, mask, np.asarray(model(ids, mask))


@pytest.mark.parametrize(("name", "mesh"), COMBINATIONS)
def test_logits_do_not_depend_on_the_mesh(name, mesh):
    model, ids, mask, expected = batch_and_logits(name)
    mesh = make_mesh(MESHES[mesh])
    with jax.set_mesh(mesh):
        placed = shard(model, mesh)
        batch = shard_batch({"ids": np.asarray(ids), "mask": np.asarray(mask)}, mesh)
        logits = _logits(placed, batch["ids"], batch["mask"], None)
    assert len(logits.sharding.device_set) == 8
    assert close(logits, expected, TOLERANCE)


def test_prompt_gradient_on_a_mesh():
    model = MODELS["llama-packed"]()
    mesh = make_mesh(MESHES["2x2x2"])
    ids = tiny_ids(model, batch=4, time=10)
    prompt = 0.4 * jax.random.normal(
        jax.random.key(0), (1, 4, model.config.embedding_dim), jnp.float32
    )

    @jax.jit
    def gradient(prompt, model, ids):
        def loss(prompt):
            _, past = model.hidden(embeddings=prompt, keep=True)
            return jnp.square(model.logits(model.hidden(ids, past=past))).mean()

        return jax.value_and_grad(loss)(prompt)

    value, expected = gradient(prompt, model, ids)
    with jax.set_mesh(mesh):
        placed, prompt = shard((model, prompt), mesh)
        sharded_value, sharded = gradient(prompt, placed, shard_batch(np.asarray(ids), mesh))
    assert close(sharded_value, value, TOLERANCE * float(value))
    assert close(sharded, expected, TOLERANCE * float(jnp.abs(expected).max()))
    assert float(jnp.abs(expected).max()) > 1e-3


def local(parameter) -> tuple[int, ...]:
    """The shape of what one device holds."""
    return parameter[...].addressable_shards[0].data.shape


def test_parameters_are_cut():
    model = shard(tiny_decoder("llama", attention_bias=True), make_mesh({"fsdp": 2, "model": 4}))
    # [L, I, O] = [2, 64, 64] ...: inputs over fsdp and outputs over model, or the reverse.
    assert local(model.layers.q.kernel) == (2, 32, 16)
    assert local(model.layers.q.bias) == (2, 16)
    assert local(model.layers.k.kernel) == (2, 32, 8)
    assert local(model.layers.o.kernel) == (2, 16, 32)
    assert local(model.layers.o.bias) == (2, 32)
    assert local(model.layers.up.kernel) == (2, 32, 24)
    assert local(model.layers.down.kernel) == (2, 24, 32)
    assert local(model.head.kernel) == (32, 32)
    assert local(model.embedding) == (32, 32)
    assert local(model.layers.attention_norm.scale) == (2, 64)


def test_packed_parameters_are_cut():
    mesh = make_mesh({"fsdp": 2, "model": 4})
    model = shard(quantize_decoder(tiny_decoder("llama"), 4, act_order=True), mesh)
    # 64 inputs of 4 bits are 8 words; with act-order scales and zeros [G, O] follow the outputs.
    assert local(model.layers.q.words) == (2, 4, 16)
    assert local(model.layers.q.scales) == local(model.layers.q.zeros) == (2, 2, 16)
    assert local(model.layers.q.group_index) == (2, 32)
    assert local(model.layers.down.words) == (2, 3, 32)
    assert local(model.layers.down.scales) == (2, 3, 32)


def test_every_device_holds_its_share():
    model = tiny_decoder("llama", num_kv_heads=4, vocab_size=256)
    total = sum(x.nbytes for x in jax.tree.leaves(model))
    placed = shard(model, make_mesh(MESHES["2x2x2"]))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed))
    # Four ways over fsdp and model; norms are copied.
    assert total / 4 <= held <= 1.02 * total / 4


def test_a_model_is_loaded_onto_a_mesh(tmp_path):
    folder = tiny_folder(tmp_path / "model", "opt", vocab_size=264)
    mesh = make_mesh(MESHES["2x2x2"])
    model = load_model(folder, mesh=mesh)
    assert local(model.layers.up.kernel) == (2, 32, 48)
    ids = tiny_ids(model, batch=4)
    with jax.set_mesh(mesh):
        assert close(model(ids), load_model(folder)(ids), TOLERANCE)


def test_axes_that_do_not_divide_stay_whole():
    mesh = make_mesh({"fsdp": 2, "model": 4})
    assert spec(("embed", "heads"), (64, 64), mesh) == P("fsdp", "model")
    assert spec(("embed", "heads"), (63, 64), mesh) == P(None, "model")
    assert spec(("batch", None), (3, 5), mesh) == P(None, None)
    assert spec(("batch", "time"), (6, 5), make_mesh({"data": 1, "fsdp": 2, "model": 4})) == P(
        ("data", "fsdp"), None
    )


def test_optimiser_state_is_placed_like_its_parameters():
    import optax

    mesh = make_mesh({"fsdp": 2, "model": 4})
    model = tiny_decoder("llama")
    state = optax.adam(1e-3).init(model)
    assert local(shard(state, mesh)[0].mu.layers.q.kernel) == (2, 32, 16)


def test_meshes():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "model": 1}
    assert dict(make_mesh({"fsdp": -1, "model": 2}).shape) == {"data": 1, "fsdp": 4, "model": 2}
    assert make_mesh({"model": 2}, devices=jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"tensor": 8}, "'tensor'; the axes are data, fsdp, model"),
        ({"data": 3}, "'data': 3.* 8 devices"),
        ({"data": 16}, "'data': 16.* 8 devices"),
        ({"data": -1, "model": 3}, "'model': 3.* 8 devices"),
        ({"data": -1, "model": -1}, "8 devices"),
        ({"data": 0}, "'data': 0.* 8 devices"),
        ({"data": -2, "fsdp": -4}, "8 devices"),
    ],
)
def test_meshes_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(shape)


def test_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match=r"12 rows .* = 8 devices; choose a multiple of 8"):
        shard_batch({"ids": np.ones((12, 3), np.int32)}, make_mesh())


def test_without_a_mesh_nothing_happens():
    x = jnp.ones((4, 8), jnp.float32)
    assert constrain(x, "batch", "embed") is x
    model = tiny_decoder("llama")
    assert shard(model, None) is model
    assert shard_batch(np.ones(3, np.int32), None).tolist() == [1, 1, 1]


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "model": 2}, {"fsdp": 8}], ids=str)
@pytest.mark.parametrize("vocabulary", [64, 63])
def test_rows_are_looked_up_where_they_lie(mesh, vocabulary):
    table = jnp.arange(vocabulary * 16, dtype=jnp.float32).reshape(vocabulary, 16)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, vocabulary, (8, 3)), jnp.int32)
    upstream = jnp.asarray(np.random.default_rng(1).normal(size=(8, 3, 16)), jnp.float32)

    def value(table, ids):
        rows = rows_of(table, ids)
        return (rows * upstream).sum(), rows

    slope = jax.value_and_grad(value, has_aux=True)
    (_, expected), wanted = slope(table, ids)
    made = make_mesh(mesh)
    with jax.set_mesh(made):
        lies = NamedSharding(made, spec(("vocab", "embed"), table.shape, made))
        placed = jax.device_put(table, lies)
        program = jax.jit(slope).lower(placed, shard_batch(ids, made)).compile()
        (_, found), gradient = program(placed, shard_batch(ids, made))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)
    with jax.set_mesh(made):
        text = jax.jit(rows_of).lower(placed, shard_batch(ids, made)).compile().as_text()
    assert f"f32[{vocabulary},16]" not in text
