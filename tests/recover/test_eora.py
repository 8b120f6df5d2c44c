"""EoRA finds the optimum of its rank, and a model with it is nearer to the dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax.models.block import layer_slice
from idp_jax.recover import LoraAdapter
from idp_jax.recover.eora import eigenspace, low_rank, with_eora
from idp_jax.weights import Dense, Lora
from tests.helpers import close, quantize_decoder, tiny_decoder, tiny_ids

KEY = jax.random.key(0)


def inputs(tokens: int, width: int) -> np.ndarray:
    """Inputs of very different sizes in different directions, float64 [tokens, width]."""
    rng = np.random.default_rng(0)
    turned = np.linalg.qr(rng.normal(size=(width, width)))[0]
    return rng.normal(size=(tokens, width)) * np.geomspace(1, 1e-2, width) @ turned


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize(("width", "outputs"), [(24, 40), (40, 24)])
def test_the_update_is_the_optimum_of_its_rank(width, outputs, rank):
    """By Eckart and Young it leaves the singular values of X D behind the rank-th."""
    x, difference = inputs(200, width), np.random.default_rng(1).normal(size=(width, outputs))
    moment = (x.T @ x).astype(np.float32)
    a, b = low_rank(jnp.asarray(difference, jnp.float32), eigenspace(jnp.asarray(moment)), rank)
    assert a.shape == (width, rank) and b.shape == (rank, outputs)
    update = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    left = np.linalg.norm(x @ (difference - update))
    best = np.sqrt((np.linalg.svd(x @ difference, compute_uv=False)[rank:] ** 2).sum())
    assert best * (1 - 1e-9) <= left <= best * (1 + 1e-4)
    # Plain singular values of the difference, which know nothing of the inputs, are worse.
    u, s, v = np.linalg.svd(difference, full_matrices=False)
    assert left < np.linalg.norm(x @ (difference - (u[:, :rank] * s[:rank]) @ v[:rank]))
    assert np.allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-4)


def test_inputs_that_leave_directions_out_give_finite_numbers():
    x, difference = inputs(5, 24), np.random.default_rng(1).normal(size=(24, 16))
    space, target = eigenspace(jnp.asarray(x.T @ x, jnp.float32)), jnp.float32(difference)
    a, b = (np.asarray(part, np.float64) for part in low_rank(target, space, 5))
    assert np.linalg.norm(x @ (difference - a @ b)) <= 1e-3 * np.linalg.norm(x @ difference)
    a, b = low_rank(target, eigenspace(jnp.zeros((24, 24), jnp.float32)), 20)
    assert np.isfinite(a).all() and np.isfinite(b).all() and (np.asarray(a @ b) == 0).all()


@pytest.fixture(scope="module", params=["llama", "opt"])
def models(request):
    """A dense model, and the same with some noise in every matrix, as compression makes it."""
    dense, rng = tiny_decoder(request.param), np.random.default_rng(0)
    noisy = {}
    for name in dense.layers.weight_names:
        weight = getattr(dense.layers, name)
        kernel = weight.kernel[...]
        noise = rng.normal(0, 0.1 * float(kernel.std()), kernel.shape)
        bias = None if weight.bias is None else weight.bias[...]
        noisy[name] = Dense(kernel + jnp.asarray(noise, jnp.float32), bias)
    return dense, dense.with_layers(dense.layers.replace(**noisy))


def test_a_full_rank_gives_the_dense_model(models):
    """Every matrix has other inputs and its own scale; at full rank nothing is left of either."""
    dense, compressed = models
    ids, rules = tiny_ids(dense, 6, 40), ("fc1|gate alpha=3",)
    start = LoraAdapter.init(dense, 64, KEY, targets=("all",), rules=rules)
    found = with_eora(start, compressed, dense, ids)
    assert close(found.repair(compressed)(ids), dense(ids), 2e-3)
    assert not close(compressed(ids), dense(ids), 0.05)
    assert jax.tree.structure(found) == jax.tree.structure(start)


def test_ranks_of_layers_are_kept_and_each_sees_the_repaired_inputs(models):
    dense, compressed = models
    ids = tiny_ids(dense, 6, 40)
    rules = (
        r"layers\.0\..*q_proj rank=5 alpha=2",
        r"layers\.1\..*(fc2|down_proj) rank=9",
        "q skip",
    )
    start = LoraAdapter.init(dense, 4, KEY, targets=(), rules=rules)
    found = with_eora(start, compressed, dense, ids)
    q, down = (np.asarray(found.a[name][...]) for name in ("q", "down"))
    assert (q[1] == 0).all() and (down[0] == 0).all() and (q[0] != 0).any()
    leaves = jax.tree.leaves(found), jax.tree.leaves(start)
    assert [leaf.shape for leaf in leaves[0]] == [leaf.shape for leaf in leaves[1]]
    # The second layer's inputs, as they come out of the first layer with its update.
    first = layer_slice(compressed.layers, 0)
    a, b = found.a["q"][...][0], found.b["q"][...][0] * (2 / 5)
    first = first.replace(q=Lora(first.q, a, b, 1.0))
    second = layer_slice(compressed.layers, 1)
    h, context, _ = compressed.start(compressed.embed(ids))
    h, _ = first(h, context)
    attended, _ = second.attention_output(second.attention_input(h), context)
    _, x = second.mlp_input(h, attended)
    x = np.asarray(second.mlp_hidden(x), np.float64).reshape(-1, 96)
    difference = np.asarray(dense.layers.down.kernel[...] - compressed.layers.down.kernel[...])[1]
    update = down[1].astype(np.float64) @ np.asarray(found.b["down"][...])[1] * (16 / 9)
    best = np.sqrt((np.linalg.svd(x @ difference, compute_uv=False)[9:] ** 2).sum())
    assert np.linalg.norm(x @ (difference - update)) <= best * (1 + 1e-3)


def test_documents_kept_apart_are_measured_as_those_of_rows_of_their_own(models):
    """Two documents in a row give the update that they give in two rows."""
    dense, compressed = models
    ids = tiny_ids(dense, 4, 24)
    start = LoraAdapter.init(dense, 3, KEY, targets=("all",))
    rows, segments = ids.reshape(2, 48), jnp.repeat(jnp.asarray([[0, 1]] * 2), 24, axis=1)
    update = lambda *text: with_eora(start, compressed, dense, *text).repair(compressed)(ids)
    own = update(ids)
    assert close(update(rows, segments), own, 1e-3)
    assert not close(update(rows), own, 1e-3)


def test_a_packed_model_is_corrected():
    dense = tiny_decoder("llama")
    compressed = quantize_decoder(dense, 4)
    ids = tiny_ids(dense, 6, 40)
    full = LoraAdapter.init(dense, 64, KEY, targets=("all",))
    found = with_eora(full, compressed, dense, ids).repair(compressed)
    assert found.decoder.layers.q.base.bits == 4
    # The random codes stand for another model altogether, so that much is added up.
    off = lambda logits: float(jnp.abs(logits - dense(ids)).max())
    assert off(found(ids)) < 0.02 * off(compressed(ids))


def test_a_teacher_of_another_size_is_refused():
    dense = tiny_decoder("llama")
    other = tiny_decoder("llama", ffw_dim=64)
    with pytest.raises(ValueError, match=r"other sizes; .*--teacher\.model") as error:
        with_eora(LoraAdapter.init(dense, 2, KEY), dense, other, tiny_ids(dense))
    assert "\n" not in str(error.value)
