"""A checkpoint is read where it is placed: the same bits, no more than the devices hold."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idp_jax import load_model
from idp_jax.config import Convert
from idp_jax.formats import hf
from idp_jax.formats.convert import convert
from idp_jax.formats.later import Later, Stacked, _placed, place, whole
from idp_jax.formats.quantization import write_config
from idp_jax.formats.source import open_source
from idp_jax.models.block import layer_slice
from idp_jax.models.matrices import matrices
from idp_jax.sharding import make_mesh, shardings
from tests.helpers import quantize_decoder, tiny_decoder, tiny_folder, write_folder

leaves = jax.tree.leaves
MESHES = {
    "fsdp": {"fsdp": 8},
    "model": {"model": 8},
    "all": {"data": 2, "fsdp": 2, "model": 2},
    "data": {"data": 8},
}


def packed_folder(folder, bits: int, **options):
    model = quantize_decoder(tiny_decoder("llama", mlp_bias=True), bits, **options)
    packings = {}
    for layer in range(model.config.num_layers):
        packings |= hf.block_packings(model.config, layer, layer_slice(model.layers, layer))
    return write_folder(model, folder, write_config("gptq_v2", packings))


def masked_folder(folder):
    convert(
        Convert(model=str(tiny_folder(folder / "dense")), out=folder / "m", to="sparse-bitmask")
    )
    return folder / "m"


def compressed_folder(folder):
    packed_folder(folder / "gptq", 4)
    tiny_folder(folder / "tokenizer")
    convert(Convert(model=str(folder / "gptq"), out=folder / "m", to="pack-quantized"))
    return folder / "m"


FOLDERS = {
    "llama": lambda path: tiny_folder(path / "m", "llama", attention_bias=True, vocab_size=264),
    "opt": lambda path: tiny_folder(path / "m", "opt", embedding_dim=32, vocab_size=264),
    "gptq": lambda path: packed_folder(path / "m", 4),
    "act-order": lambda path: packed_folder(path / "m", 3, act_order=True),
    "pack-quantized": compressed_folder,
    "bitmask": masked_folder,
}


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request, tmp_path_factory):
    return FOLDERS[request.param](tmp_path_factory.mktemp("model"))


def test_layers_of_two_half_types_are_held_in_the_smallest_type_of_both():
    layers = [np.ones(3, np.float16), np.full(3, 2.0, jnp.bfloat16)]
    stacked = Stacked(layers)
    assert stacked.dtype == np.float32
    np.testing.assert_array_equal(place({"x": stacked}, None)["x"], [[1.0] * 3, [2.0] * 3])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mesh_gets_the_bits_of_one_device(folder, mesh, dtype):
    mesh = make_mesh(MESHES[mesh])
    alone = load_model(folder, weights="packed", dtype=dtype)
    together = load_model(folder, weights="packed", dtype=dtype, mesh=mesh)
    assert jax.tree.structure(alone) == jax.tree.structure(together)
    wanted = jax.tree.leaves(shardings(alone, mesh))
    pairs = zip(jax.tree.leaves(alone), jax.tree.leaves(together), wanted, strict=True)
    for one, other, sharding in pairs:
        assert one.dtype == other.dtype and other.sharding == sharding
        np.testing.assert_array_equal(*(np.asarray(x).view(np.uint8) for x in (one, other)))


def test_blocks_read_one_by_one_are_those_of_the_model(folder):
    model, reader = load_model(folder, weights="packed"), hf.Reader(open_source(folder))
    for layer in range(model.config.num_layers):
        block = reader.block(layer)
        assert all(isinstance(leaf, np.ndarray) and leaf.flags.owndata for leaf in leaves(block))
        for one, other in zip(leaves(block), leaves(layer_slice(model.layers, layer)), strict=True):
            np.testing.assert_array_equal(one, other)


class Watched:
    """Counts the numbers that are looked at."""

    def __init__(self, array: np.ndarray):
        self.array, self.seen, self.T = array, [], None

    def __getitem__(self, index):
        part = self.array[index]
        self.seen.append(part.size)
        return part


def test_each_part_is_read_once():
    array = np.arange(4 * 16 * 24, dtype=np.float32).reshape(4, 16, 24)
    layers = [Watched(layer) for layer in array]
    opened = []
    make = lambda layer: Later((16, 24), np.float32, lambda: opened.append(layer) or layer)
    mesh = make_mesh({"data": 2, "fsdp": 4})
    places = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    placed = _placed(Stacked([make(layer) for layer in layers]), places)
    np.testing.assert_array_equal(placed, array)
    assert len(opened) == 4 and all(layer.seen == [4 * 24] * 4 for layer in layers)


def test_replicas_do_not_share_memory():
    """What one device is given away may be written to."""
    array = np.ones((8, 64), np.float32)
    placed = place({"x": array}, make_mesh({"data": 8}))["x"]
    places = {shard.data.unsafe_buffer_pointer() for shard in placed.addressable_shards}
    assert len(places) == 8


def test_layers_of_two_types_become_one_that_holds_both():
    layers = [np.ones(3, jnp.bfloat16), np.full(3, 1.001, np.float32)]
    placed = place([Stacked(layers)], None)[0]
    assert placed.dtype == np.float32
    np.testing.assert_array_equal(placed, np.stack([x.astype(np.float32) for x in layers]))


def test_later_is_what_it_says():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    later = Later((3, 4), np.float32, lambda: array)
    assert later.T.shape == (4, 3) and later.ndim == 2
    np.testing.assert_array_equal(later.T[1:3, :2], array.T[1:3, :2])
    np.testing.assert_array_equal(later.astype(np.float16).T[...], array.T.astype(np.float16))
    own = whole([later.T])[0]
    assert own.flags.owndata and own.flags.c_contiguous


@pytest.mark.parametrize(("bits", "mesh"), [(None, None), (None, "fsdp"), (4, None), (4, "fsdp")])
def test_the_host_holds_the_model_once(tmp_path, bits, mesh):
    """numpy's memory; on a CPU the arrays of the devices are made of it."""
    shape = {"hidden_dim": 256, "ffw_dim": 512, "num_layers": 12, "vocab_size": 512}
    model = tiny_decoder("llama", **shape)
    if bits is None:
        folder = write_folder(model, tmp_path / "m")
    else:
        model, packings = quantize_decoder(model, bits), {}
        for layer in range(12):
            packings |= hf.block_packings(model.config, layer, layer_slice(model.layers, layer))
        folder = write_folder(model, tmp_path / "m", write_config("gptq_v2", packings))
    mesh = None if mesh is None else make_mesh(MESHES[mesh])
    load = lambda: jax.block_until_ready(load_model(folder, weights="packed", mesh=mesh))
    load()
    tracemalloc.start()
    try:
        loaded = load()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    held = sum(shard.data.nbytes for x in leaves(loaded) for shard in x.addressable_shards)
    layer = sum(x.nbytes for x in leaves(loaded.layers)) / 12
    assert 0.9 * held < peak < 1.2 * held + 2 * layer


def test_numbers_that_are_not_finite_are_named(tmp_path):
    model = tiny_decoder("llama")
    model.layers.up.kernel[...] = model.layers.up.kernel[...].at[1, 3, 5].set(jnp.nan)
    folder = write_folder(model, tmp_path / "m")
    for mesh in (None, make_mesh({"fsdp": 8})):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight .* 1 of"):
            load_model(folder, mesh=mesh)


def test_every_matrix_is_left_to_be_read(tmp_path):
    """Nothing large is read before it is placed."""
    folder = tiny_folder(tmp_path / "m")
    model = hf.Reader(open_source(folder)).decoder()
    for matrix in matrices(model.config):
        stack = getattr(model.layers, matrix.name).kernel.get_value()
        assert isinstance(stack, Stacked) and all(isinstance(x, Later) for x in stack.layers)
    assert isinstance(model.embedding.get_value(), Later)
