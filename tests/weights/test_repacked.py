"""Weights in the kernels' layout: the same function as the packed weight they were made from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from idp_jax import load_model, save_model
from idp_jax.formats.quantization import Packing, write_config
from idp_jax.kernels.packing import pack, unpack
from idp_jax.kernels.quant_matmul.layout import KernelWeight
from idp_jax.kernels.sparse24_matmul.layout import SparseWeight
from idp_jax.models import storage
from idp_jax.models.storage import repack, restore, wrong_products
from idp_jax.sharding import make_mesh, shard
from idp_jax.weights import Dense, Quantized, Repacked
from idp_jax.weights import repack as repack_weight
from tests.helpers import close, quantize_decoder, tiny_decoder, tiny_ids, write_folder


def _weight(act_order=False):
    return quantize_decoder(tiny_decoder("llama"), 4, act_order=act_order).layers.q


def test_on_a_cpu_auto_changes_nothing():
    weight = _weight()
    assert repack_weight(weight) is weight


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("backend", ["pallas_tpu", "mosaic_gpu"])
def test_there_and_back(act_order, backend):
    weight = _weight(act_order)
    repacked = repack_weight(weight, backend=backend)
    assert isinstance(repacked, Repacked)
    restored = repacked.restored()
    for before, after in zip(jax.tree.leaves(weight), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(repacked.dense(), weight.dense())


def test_layers_in_a_scan():
    weight = _weight(act_order=True)
    repacked = repack_weight(weight, backend="pallas_tpu")
    repacked.backend = "auto"
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, weight.dense().shape[1])), jnp.float32)

    @jax.jit
    def walk(weight, x):
        return jax.lax.scan(lambda x, layer: (layer(x), None), x, weight)[0]

    np.testing.assert_allclose(walk(repacked, x), walk(weight, x), rtol=1e-4, atol=1e-5)


def _repacked(model, mesh=None):
    """A model in the kernels' layout that computes on any machine."""
    model = repack(model, "pallas_tpu", mesh)
    for name in model.layers.weight_names:
        getattr(model.layers, name).backend = "auto"
    return model


def _folder(model, path):
    settings = write_config("gptq_v2", {"q_proj": Packing(4, 32, False)}, damping=0.01)
    return write_folder(model, path, settings)


@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "model": 2}], ids=["one", "mesh"])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_whole_model(mesh, act_order):
    model = quantize_decoder(tiny_decoder("llama"), 4, act_order=act_order)
    ids = tiny_ids(model, batch=4)
    expected = model(ids)
    mesh = None if mesh is None else make_mesh(mesh)
    placed = _repacked(shard(model, mesh), mesh)
    assert all(isinstance(getattr(placed.layers, n), Repacked) for n in model.layers.weight_names)
    with jax.set_mesh(mesh or make_mesh({}, jax.devices()[:1])):
        assert close(jax.jit(lambda model, ids: model(ids))(placed, ids), expected, 1e-4)


def _sparse(model):
    """The model with its first two of every four inputs only, as bfloat16 numbers."""
    kept = lambda kernel: jnp.arange(kernel.shape[1])[:, None] % 4 < 2
    round_off = lambda kernel: jnp.where(kept(kernel), kernel, 0).astype(jnp.bfloat16)
    weights = {
        name: Dense(round_off(weight.kernel[...]).astype(jnp.float32), weight.bias)
        for name in model.layers.weight_names
        for weight in [getattr(model.layers, name)]
    }
    return model.with_layers(model.layers.replace(**weights))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, {"data": 4, "model": 2}], ids=["one", "mesh"])
def test_a_sparse_model(mesh):
    model = _sparse(tiny_decoder("llama"))
    ids = tiny_ids(model, batch=4)
    expected = model(ids)
    mesh = None if mesh is None else make_mesh(mesh)
    placed = _repacked(shard(model, mesh), mesh)
    # The inputs of these make no two parts of whole tiles.
    whole = () if mesh is None else ("o", "down")
    for name in model.layers.weight_names:
        assert isinstance(getattr(placed.layers, name), Dense if name in whole else Repacked)
    with jax.set_mesh(mesh or make_mesh({}, jax.devices()[:1])):
        assert close(jax.jit(lambda model, ids: model(ids))(placed, ids), expected, 1e-4)
    for before, after in zip(jax.tree.leaves(model), jax.tree.leaves(restore(placed)), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)


def test_a_packed_sparse_model():
    model = quantize_decoder(tiny_decoder("opt"), 4)
    q = model.layers.q
    codes = unpack(q.words[...], 4, axis=1)
    every = jnp.repeat(q.zeros[...], codes.shape[1] // q.zeros.shape[1], 1)
    codes = jnp.where(jnp.arange(codes.shape[1])[:, None] % 4 < 2, codes, every)
    q.words[...] = pack(codes, 4, axis=1)
    repacked = repack(model, "pallas_tpu").layers
    assert isinstance(repacked.q.packed.get_value(), SparseWeight)
    assert isinstance(repacked.k.packed.get_value(), KernelWeight)
    for before, after in zip(
        jax.tree.leaves(q), jax.tree.leaves(repacked.q.restored()), strict=True
    ):
        np.testing.assert_array_equal(before, after)


def test_a_sparse_matrix_that_no_kernel_takes_stays_dense(caplog):
    model = _sparse(tiny_decoder("llama"))
    model.layers.q.kernel[...] *= jnp.float32(1 / 3)
    repacked = repack(model, "pallas_tpu").layers
    assert isinstance(repacked.q, Dense)
    assert isinstance(repacked.k, Repacked)
    assert "q: no 2:4 kernel multiplies by it (its values are no bfloat16" in caplog.text
    assert isinstance(repack(tiny_decoder("llama"), "pallas_tpu").layers.q, Dense)
    assert isinstance(repack(model, "pallas_tpu", use_sparse24=False).layers.k, Dense)
    assert isinstance(repack(model, "pallas_tpu", make_mesh({"fsdp": 8})).layers.k, Repacked)


def test_a_model_is_saved_as_it_was_read(tmp_path):
    source = _folder(quantize_decoder(tiny_decoder("llama"), 4), tmp_path / "source")
    loaded = load_model(source)
    out = save_model(_repacked(loaded), tmp_path / "saved", like=source)
    for before, after in zip(
        jax.tree.leaves(loaded), jax.tree.leaves(load_model(out)), strict=True
    ):
        np.testing.assert_array_equal(before, after)


def test_a_kernel_that_the_machine_lacks_is_refused_before_anything_is_read(tmp_path):
    for kernel in ("pallas_tpu", "mosaic_gpu"):
        with pytest.raises(ValueError, match=f"{kernel} cannot serve: it needs a"):
            load_model(tmp_path / "nowhere", kernel=kernel)
    source = _folder(quantize_decoder(tiny_decoder("llama"), 4), tmp_path / "source")
    for kernel in ("auto", "xla"):
        assert isinstance(load_model(source, kernel=kernel).layers.q, Quantized)


@pytest.mark.parametrize("number", [np.float16(0.1), jnp.bfloat16(1e-6)])
def test_scales_of_16_bits_are_found_in_float32(number):
    model = quantize_decoder(tiny_decoder("llama"), 4)
    model.layers.q.scales = nnx.Param(jnp.full(model.layers.q.scales.shape, number, jnp.float32))
    repacked = repack(model, "pallas_tpu").layers.q
    assert repacked.packed.get_value().scale_dtype == number.dtype.name
    np.testing.assert_array_equal(repacked.dense(), model.layers.q.dense())


def test_what_no_kernel_takes_stays_or_is_refused(caplog):
    model = quantize_decoder(tiny_decoder("llama"), 4, act_order=True)
    shape = model.layers.q.scales.shape
    model.layers.q.scales = nnx.Param(jnp.full(shape, 0.1, jnp.float32))
    with pytest.raises(ValueError, match="q: pallas_tpu cannot multiply .* scales are float32"):
        repack(model, "pallas_tpu")
    assert isinstance(repack(model, "auto").layers.q, Quantized)
    assert "q: no kernel multiplies by it" in caplog.text
    model.layers.q.scales = nnx.Param(jnp.ones(shape, jnp.float16))
    index = model.layers.q.group_index
    index[...] = jnp.zeros_like(index[...]).at[:, 0].set(1)
    with pytest.raises(ValueError, match="groups have different sizes"):
        repack(model, "pallas_tpu")


def test_a_cpu_without_the_memory_keeps_matrices_packed(tmp_path, monkeypatch, caplog):
    source = _folder(quantize_decoder(tiny_decoder("llama"), 4), tmp_path / "source")
    assert isinstance(load_model(source, weights="auto").layers.q, Dense)
    monkeypatch.setattr(storage, "available_memory", lambda: 1000)
    assert isinstance(load_model(source, weights="auto").layers.q, Quantized)
    assert "stay packed" in caplog.text
    assert isinstance(load_model(source, weights="dense").layers.q, Dense)


@pytest.mark.parametrize("factor", [1.0, -1.0, np.nan])
def test_a_kernel_that_multiplies_wrongly_is_found(factor, monkeypatch):
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
    model = quantize_decoder(tiny_decoder("opt"), 3)
    q = _repacked(shard(model, mesh), mesh).layers.q
    model = model.with_layers(model.layers.replace(q=q))
    right = Repacked.__call__
    batches_wrong = lambda self, x: right(self, x) * (1.0 if x.shape[0] == 1 else factor)
    monkeypatch.setattr(Repacked, "__call__", batches_wrong)
    jax.clear_caches()
    assert wrong_products(model, mesh) == ([] if factor == 1.0 else ["q"])
