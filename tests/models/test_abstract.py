"""Models without their checkpoints: shapes and random numbers are those that loading gives."""

import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax import load_model
from idp_jax.formats import hf, open_source
from idp_jax.formats.source import open_config
from idp_jax.models.abstract import Storage, abstract, random
from idp_jax.models.config import from_hf
from idp_jax.models.matrices import matrices
from idp_jax.models.storage import repack
from idp_jax.weights import Dense, Quantized
from tests.helpers import tiny_config, tiny_ids

ROOT = Path(__file__).parents[2]
GOLDEN = sorted(file.parent for file in (ROOT / "tests/golden").rglob("config.json"))
STORAGES = {
    "dense": Storage(),
    "3-bit": Storage(3, 32),
    "act-order": Storage(4, 32, act_order=True),
    "8-bit-rows": Storage(8, -1),
    "kernel-3-bit": Storage(3, 32, backend="pallas_tpu"),
    "kernel-act-order": Storage(4, 32, act_order=True, backend="pallas_tpu"),
    "fragments-2-bit": Storage(2, 32, backend="mosaic_gpu"),
    "sparse24": Storage(sparse24=True, backend="pallas_tpu"),
    "sparse24-4-bit": Storage(4, 32, sparse24=True, backend="pallas_tpu"),
}


def shapes(model):
    """The structure, and shape and dtype of every leaf."""
    return jax.tree.structure(model), [(x.shape, x.dtype) for x in jax.tree.leaves(model)]


def storage_of(weight) -> Storage:
    """How a loaded matrix is kept."""
    if isinstance(weight, Dense):
        return Storage()
    size = weight.inputs // weight.groups if weight.groups > 1 else -1
    scales, named = weight.scales[...].dtype.name, weight.group_index is not None
    return Storage(weight.bits, size, act_order=named, scale_dtype=scales)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_shapes_are_those_of_a_loaded_model(folder, dtype):
    loaded = hf.assemble(open_source(folder), dtype=dtype)
    weights = {
        name: storage_of(getattr(loaded.layers, name)) for name in loaded.layers.weight_names
    }
    model = abstract(from_hf(open_config(folder)), dtype=dtype, weights=weights)
    assert shapes(model) == shapes(loaded)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_shapes_are_those_of_a_random_model(storage, architecture):
    config = tiny_config(architecture, num_heads=1, num_kv_heads=1)
    made = random(config, 0, dtype="bfloat16", weights=storage)
    assert shapes(abstract(config, dtype="bfloat16", weights=storage)) == shapes(made)


@pytest.mark.parametrize("storage", [STORAGES["kernel-3-bit"], STORAGES["sparse24"]])
def test_kernel_layouts_are_those_that_loading_makes(storage):
    """What `load_model` repacks on a machine with the kernels."""
    config = tiny_config()
    in_file = random(config, 0, weights=replace(storage, backend=None))
    expected = repack(in_file, storage.backend)
    made = random(config, 0, weights=storage)
    assert shapes(made) == shapes(expected)
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("bits", [None, 4])
def test_two_of_four_inputs_are_zero(bits):
    layers = random(tiny_config(), 0, weights=Storage(bits, 32, sparse24=True)).layers
    kernel = np.asarray(layers.down.dense())
    kept = (kernel.reshape(2, -1, 4, kernel.shape[-1]) != 0).sum(2)
    assert kept.max() == 2
    assert kept.mean() > 1.5  # a code may be the zero's by chance


@pytest.mark.parametrize("key", [0, jax.random.key(0)], ids=["host", "device"])
@pytest.mark.parametrize(
    "storage", [Storage(), Storage(3, 32), Storage(8, -1)], ids=["dense", "3", "8"]
)
def test_random_matrices_keep_the_size_of_what_they_read(storage, key):
    layers = random(tiny_config(), key, weights=storage).layers
    for matrix in matrices(tiny_config()):
        spread = float(getattr(layers, matrix.name).dense().std()) * matrix.inputs**0.5
        assert 0.5 < spread < 1.5, matrix.name


def test_a_seed_gives_a_part_the_same_numbers_in_every_model():
    dense, packed = (random(tiny_config(), 3, weights=s) for s in (Storage(), Storage(4, 32)))
    np.testing.assert_array_equal(dense.embedding[...], packed.embedding[...])
    np.testing.assert_array_equal(
        dense.layers.mlp_norm.scale[...], packed.layers.mlp_norm.scale[...]
    )
    assert (dense.embedding[...] != random(tiny_config(), 4).embedding[...]).all()


def test_every_parameter_is_random():
    """No two numbers alike: a forgotten bias, norm or position shows."""
    model = random(tiny_config("opt", embedding_dim=32), 0)
    for leaf in jax.tree.leaves(model):
        assert len(np.unique(np.asarray(leaf))) > 0.99 * min(leaf.size, 10**6)


def test_matrices_may_be_kept_differently():
    config = tiny_config("opt")
    weights = {matrix.name: Storage() for matrix in matrices(config)} | {"q": Storage(4, 32)}
    layers = abstract(config, weights=weights).layers
    assert isinstance(layers.q, Quantized)
    assert isinstance(layers.k, Dense)


@pytest.mark.parametrize(
    "storage", [Storage(), Storage(3, 128, backend="mosaic_gpu")], ids=["dense", "3-bit"]
)
def test_a_large_model_takes_no_memory(storage):
    started = time.perf_counter()
    model = abstract(
        from_hf(open_config(ROOT / "configs/models/llama-70b")), dtype="bfloat16", weights=storage
    )
    leaves = jax.tree.leaves(model)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert (137e9 < size < 139e9) if storage.bits is None else (27e9 < size < 30e9)
    ids = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    lowered = jax.jit(lambda model, ids: model.logits(model.hidden(ids))).lower(
        abstract(model.config, dtype="bfloat16"), ids
    )
    assert lowered.out_info.shape == (1, 16, 32000)
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("name", ["3-bit", "act-order"])
def test_a_program_compiled_for_shapes_runs_the_model(name):
    model = random(tiny_config(), 0, weights=STORAGES[name])
    ids = tiny_ids(model)
    forward = jax.jit(lambda model, ids: model.logits(model.hidden(ids)))
    shaped = abstract(tiny_config(), weights=STORAGES[name])
    logits = forward.lower(shaped, ids).compile()(model, ids)
    np.testing.assert_array_equal(logits, forward(model, ids))


def test_load_model_gives_the_same_tree():
    folder = ROOT / "tests/golden/llama-gqa"
    assert shapes(abstract(from_hf(open_config(folder)))) == shapes(load_model(folder))
