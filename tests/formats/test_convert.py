"""From form to form: no number changes, one block is held, and what cannot be is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from idp_jax import load_model, load_tokenizer
from idp_jax.cli import main
from idp_jax.config import Convert
from idp_jax.formats import write
from idp_jax.formats.convert import convert
from idp_jax.formats.hf import Reader
from idp_jax.formats.quantization import PACKED_FORMS, Packing, write_config
from idp_jax.formats.source import open_source
from idp_jax.weights import Dense, Quantized
from tests.helpers import quantize_decoder, tiny_decoder, tiny_folder, tiny_tokenizer, write_folder


def packed_folder(folder, bits=3, form="gptq_v2", act_order=False, architecture="opt"):
    model = quantize_decoder(tiny_decoder(architecture), bits, act_order=act_order)
    settings = write_config(form, {"q": Packing(bits, 32, False, act_order)})
    tiny_tokenizer().save_pretrained(write_folder(model, folder, settings))
    return folder, model


def pruned_folder(folder, keep: int = 2, architecture="llama"):
    """A model of which every run of 4 inputs keeps so many."""
    model = tiny_decoder(architecture)
    for name in model.layers.weight_names:
        kernel = getattr(model.layers, name).kernel
        mask = jnp.arange(kernel.shape[1])[:, None] % 4 < keep
        kernel[...] = jnp.where(mask, kernel[...], 0)
    return write_folder(model, folder), model


def assert_same_matrices(one, other) -> None:
    for name in one.layers.weight_names:
        x, y = (getattr(model.layers, name) for model in (one, other))
        np.testing.assert_array_equal(x.dense(), y.dense(), err_msg=name)
        if x.bias is not None:
            np.testing.assert_array_equal(x.bias[...], y.bias[...])


def assert_same(one, other) -> None:
    flat, structure = jax.tree.flatten_with_path(one)
    assert structure == jax.tree.structure(other)
    for (path, x), y in zip(flat, jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_round_trip_through_every_packed_form(tmp_path, bits, act_order):
    source, model = packed_folder(tmp_path / "model", bits, act_order=act_order)
    for form in (*PACKED_FORMS, "gptq", "gptq_v2"):
        source = convert(Convert(model=str(source), out=tmp_path / form, to=form, overwrite=True))
        loaded = load_model(source)
        assert isinstance(loaded.layers.q, Quantized)
        assert_same(loaded, model)
        config = json.loads((source / "config.json").read_text())["quantization_config"]
        assert (source / "quantize_config.json").is_file() == (form != "pack-quantized")
        assert config.get("checkpoint_format", config.get("format")) == form
    source = convert(Convert(model=str(source), out=tmp_path / "dense", to="dense"))
    loaded = load_model(source)
    assert isinstance(loaded.layers.q, Dense)
    assert_same_matrices(loaded, model)
    assert "quantization_config" not in json.loads((source / "config.json").read_text())
    assert load_tokenizer(source)("tide")["input_ids"] == tiny_tokenizer()("tide")["input_ids"]


@pytest.mark.parametrize("form", ["sparse-bitmask", "sparse-24-bitmask"])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_round_trip_through_every_sparse_form(tmp_path, form, architecture):
    source, model = pruned_folder(tmp_path / "model", architecture=architecture)
    out = convert(Convert(model=str(source), out=tmp_path / "sparse", to=form))
    tensors = load_file(out / "model.safetensors")
    masks = [name for name in tensors if name.endswith(".bitmask")]
    assert len(masks) == 2 * len(model.layers.weight_names)
    assert tensors[masks[0]].dtype == np.uint8
    assert_same(load_model(out), model)
    main(["convert", str(out), "--out", str(tmp_path / "dense"), "--to", "dense"])
    assert_same(load_model(tmp_path / "dense"), model)


def test_masks_under_the_whole_name_of_every_tensor(tmp_path):
    """compressed-tensors up to 0.8 masked norms and embeddings too, and kept ".weight"."""
    source, model = pruned_folder(tmp_path / "model")
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        mask = tensor != 0
        counts = mask.sum(-1)
        tensors |= {
            f"{name}.shape": np.array(tensor.shape),
            f"{name}.compressed": tensor[mask],
            f"{name}.bitmask": np.packbits(mask, axis=-1, bitorder="little"),
            f"{name}.row_offsets": np.cumsum(counts, axis=0) - counts,
        }
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["compression_config"] = {"sparsity_config": {"format": "sparse-bitmask"}}
    (source / "config.json").write_text(json.dumps(config))
    assert_same(load_model(source), model)
    assert Reader(open_source(source)).layout.form == "sparse-bitmask"


@pytest.mark.parametrize("form", PACKED_FORMS)
def test_act_order_that_others_may_ignore_is_told(tmp_path, caplog, form):
    for name, act_order in (("runs", False), ("order", True)):
        source, _ = packed_folder(tmp_path / name, 4, form="gptq_v2", act_order=act_order)
        convert(Convert(model=str(source), out=tmp_path / f"{name}-out", to=form))
    said = [record.getMessage() for record in caplog.records if "act-order" in record.getMessage()]
    assert len(said) == (form == "pack-quantized")
    for line in said:
        assert line.startswith("12 matrices such as model.decoder.layers.0.self_attn.q_proj")
        assert "gptq_v2" in line and "\n" not in line


def test_bfloat16_and_float32(tmp_path):
    source, model = packed_folder(tmp_path / "model", 8)
    half = convert(Convert(model=str(source), out=tmp_path / "half", to="dense", dtype="bfloat16"))
    tensors = load_file(half / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_model(half)
    expected = np.asarray(model.layers.q.dense()).astype(jnp.bfloat16)
    np.testing.assert_array_equal(loaded.layers.q.kernel[...], expected.astype(np.float32))


def test_scales_in_bfloat16_are_read_as_they_are(tmp_path):
    source, model = packed_folder(tmp_path / "model", 4, architecture="llama")
    out = convert(Convert(model=str(source), out=tmp_path / "packed", to="pack-quantized"))
    tensors = load_file(out / "model.safetensors")
    scales = [name for name in tensors if name.endswith("weight_scale")]
    rounded = {name: tensors[name].astype(jnp.bfloat16) for name in scales}
    save_file(tensors | rounded, out / "model.safetensors")
    ours = load_model(out).layers.q.scales[...]
    assert ours.dtype == np.float32
    expected = np.asarray(model.layers.q.scales[...]).astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(ours, expected)
    # bfloat16 scales of this size are float16 numbers as well.
    back = convert(Convert(model=str(out), out=tmp_path / "back", to="gptq_v2"))
    np.testing.assert_array_equal(load_model(back).layers.q.scales[...], expected)


def test_one_block_is_held_at_a_time(tmp_path, monkeypatch):
    """A shard is written before the next block is read, and the shards are complete."""
    source, model = packed_folder(tmp_path / "model")
    monkeypatch.setattr(write, "MAX_SHARD_BYTES", 10_000)
    written, events = [], []
    flush, block = write.Shards._flush, Reader.block

    def flushed(self):
        written.extend(self._held)
        return flush(self)

    def read(self, layer):
        events.append((layer, sum("layers." in name for name in written)))
        return block(self, layer)

    monkeypatch.setattr(write.Shards, "_flush", flushed)
    monkeypatch.setattr(Reader, "block", read)
    out = convert(Convert(model=str(source), out=tmp_path / "out", to="pack-quantized"))
    assert events[0] == (0, 0) and events[1][0] == 1 and events[1][1] > 15
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(file.name for file in out.glob("*.safetensors")) and len(files) > 3
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(out / file).values()]
        assert sum(sizes) <= 10_000 or len(sizes) == 1
    monkeypatch.setattr(Reader, "block", block)
    assert_same(load_model(out), model)


@pytest.mark.parametrize("form", [*PACKED_FORMS, "sparse-bitmask", "dense"])
def test_transformers_reads_the_configuration(tmp_path, form):
    from transformers import AutoConfig

    make = pruned_folder if form == "sparse-bitmask" else packed_folder
    source, _ = make(tmp_path / "model")
    out = convert(Convert(model=str(source), out=tmp_path / "out", to=form))
    config = AutoConfig.from_pretrained(out)
    assert (getattr(config, "quantization_config", None) is None) == (form == "dense")


def run(capsys, *arguments) -> str:
    """The one line of a command that fails."""
    with pytest.raises(SystemExit) as stop:
        main(["convert", *map(str, arguments)])
    assert stop.value.code == 2
    *bar, said = capsys.readouterr().err.splitlines()
    assert all(not line or line.startswith("converting") for line in bar)
    return said


def test_what_cannot_be_converted(tmp_path, capsys):
    dense = tiny_folder(tmp_path / "dense", "llama")
    packed, _ = packed_folder(tmp_path / "packed", 4)
    half, _ = pruned_folder(tmp_path / "half", keep=3)
    out = tmp_path / "out"
    for form in PACKED_FORMS:
        said = run(capsys, dense, "--out", out, "--to", form)
        assert "is not packed" in said and form in said and "compress it first" in said
    said = run(capsys, packed, "--out", out, "--to", "sparse-bitmask")
    assert "is packed" in said and "sparse-bitmask" in said
    said = run(capsys, half, "--out", out, "--to", "sparse-24-bitmask")
    assert "model.layers.0.self_attn.q_proj is not 2:4 sparse" in said
    assert "gguf" in run(capsys, dense, "--out", out, "--to", "gguf")
    assert "exists" in run(capsys, packed, "--out", dense, "--to", "dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "half", "packed"]


def test_a_tensor_of_no_use_stops_the_conversion(tmp_path, capsys):
    packed, _ = packed_folder(tmp_path / "packed", 4)
    file = packed / "model.safetensors"
    save_file(load_file(file) | {"model.extra": np.ones(3)}, file)
    assert "model.extra" in run(capsys, packed, "--out", tmp_path / "out", "--to", "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
