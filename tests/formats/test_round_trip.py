"""What is saved is loaded back bit for bit, by us and by transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from idp_jax import load_model, load_tokenizer, save_model
from idp_jax.formats import gptq, write
from idp_jax.formats.quantization import BITS, GPTQ_FORMS, Packing, write_config
from idp_jax.weights import Dense, Quantized
from tests.helpers import (
    close,
    quantize_decoder,
    random_quantized,
    tiny_decoder,
    tiny_folder,
    tiny_ids,
    write_folder,
)

DENSE = {
    "llama": lambda: tiny_decoder("llama", head_dim=24, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: tiny_decoder("llama", tied_embeddings=True),
    "opt": lambda: tiny_decoder("opt"),
    "opt-350m-like": lambda: tiny_decoder(
        "opt", norm_before=False, final_norm=False, embedding_dim=32
    ),
    "opt-bare": lambda: tiny_decoder(
        "opt", attention_bias=False, mlp_bias=False, norm_affine=False, tied_embeddings=False
    ),
}


def settings(bits: int, version: str = "gptq_v2") -> dict:
    config = write_config(version, {"q_proj": Packing(bits, 32, False)}, damping=0.01)
    assert config is not None
    return config


def assert_same(first, second) -> None:
    """Same structure, same numbers, same dtypes."""
    flat, structure = jax.tree.flatten_with_path(first)
    other, other_structure = jax.tree.flatten_with_path(second)
    assert structure == other_structure
    for (path, x), (_, y) in zip(flat, other, strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


@pytest.mark.parametrize("variant", sorted(DENSE))
def test_dense(tmp_path, variant):
    model = DENSE[variant]()
    source = write_folder(model, tmp_path / "source")
    loaded = load_model(source)
    assert loaded.config == model.config
    assert_same(loaded, model)
    changed = jax.tree.map(lambda x: x + 1, loaded)
    save_model(changed, tmp_path / "saved", like=source)
    assert_same(load_model(tmp_path / "saved"), changed)


@pytest.mark.parametrize("variant", sorted(DENSE))
def test_transformers_reads_what_is_saved(tmp_path, variant):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = DENSE[variant]()
    source = write_folder(model, tmp_path / "source")
    save_model(model, tmp_path / "saved", like=source)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(info.values()), info
    ids = tiny_ids(model)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(np.asarray(ids))).logits.numpy()
    assert close(model(ids), expected)


def test_tokenizer_report_and_dtype_are_saved(tmp_path):
    source = tiny_folder(tmp_path / "source", "llama")
    model = load_model(source, dtype="bfloat16")
    out = save_model(model, tmp_path / "saved", like=source, report={"method": "none"})
    assert json.loads((out / "compression.json").read_text()) == {"method": "none"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    text = "Grüße, 3 lines\nof <s>text"
    assert load_tokenizer(out)(text)["input_ids"] == load_tokenizer(source)(text)["input_ids"]
    assert_same(load_model(out, dtype="auto"), model)


def test_a_report_is_valid_json(tmp_path):
    source = tiny_folder(tmp_path / "source", "llama")
    report = {"error": float("nan"), "matrices": [{"loss": float("inf")}]}
    out = save_model(load_model(source), tmp_path / "saved", like=source, report=report)
    found = json.loads((out / "compression.json").read_text(), parse_constant=pytest.fail)
    assert found == {"error": None, "matrices": [{"loss": None}]}


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "MAX_SHARD_BYTES", 50_000)
    model = tiny_decoder("llama")
    source = write_folder(model, tmp_path / "source")
    save_model(model, tmp_path / "saved", like=source)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(model))
    assert_same(load_model(tmp_path / "saved"), model)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", GPTQ_FORMS)
@pytest.mark.parametrize("bits", BITS)
def test_gptq(tmp_path, bits, version, act_order):
    """`random_quantized` draws every zero point, so v1's shift wraps around at both ends."""
    architecture = "opt" if bits in (2, 8) else "llama"
    model = quantize_decoder(tiny_decoder(architecture), bits, act_order=act_order)
    source = write_folder(model, tmp_path / "source", settings(bits, version))
    loaded = load_model(source)
    assert_same(loaded, model)
    save_model(loaded, tmp_path / "saved", like=source, quantization=settings(bits, version))
    assert_same(load_model(tmp_path / "saved"), model)


def test_scales_are_not_rounded_to_the_dtype_of_the_model(tmp_path):
    model = quantize_decoder(tiny_decoder("llama"), 4)
    source = write_folder(model, tmp_path / "source", settings(4))
    half = load_model(source, dtype="bfloat16")
    assert half.embedding[...].dtype == jnp.bfloat16
    assert_same(half.layers.q, model.layers.q)


def test_groups_without_an_index_have_the_size_of_the_settings(tmp_path):
    """96 inputs in groups of 64: the last group is shorter, and two equal ones would be wrong."""
    model = quantize_decoder(tiny_decoder("llama"), 4, act_order=True)
    index = jnp.broadcast_to(jnp.arange(96, dtype=jnp.int32) // 64, (2, 96))
    down = model.layers.down
    down.group_index[...] = index
    down.scales, down.zeros = nnx.Param(down.scales[:, :2]), nnx.Param(down.zeros[:, :2])
    source = write_folder(model, tmp_path / "source", settings(4) | {"group_size": 64})
    tensors = load_file(source / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if not name.endswith("down_proj.g_idx")}
    save_file(kept, source / "model.safetensors")
    assert_same(load_model(source).layers.down, down)


@pytest.mark.parametrize("version", GPTQ_FORMS)
def test_resaving_a_packed_model_keeps_its_settings(tmp_path, version):
    model = quantize_decoder(tiny_decoder("llama"), 3)
    source = write_folder(model, tmp_path / "source", settings(3, version))
    out = save_model(load_model(source), tmp_path / "saved", like=source)
    assert (
        json.loads((out / "config.json").read_text())["quantization_config"]["checkpoint_format"]
        == version
    )
    assert_same(load_model(out), model)


def test_a_packed_model_saved_dense_says_nothing_of_packing(tmp_path):
    source = write_folder(
        quantize_decoder(tiny_decoder("llama"), 4), tmp_path / "source", settings(4)
    )
    dense = load_model(source, weights="dense")
    out = save_model(dense, tmp_path / "saved", like=source)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert_same(load_model(out), dense)


def test_a_packed_model_without_settings_is_not_saved(tmp_path):
    model = quantize_decoder(tiny_decoder("llama"), 4)
    source = write_folder(tiny_decoder("llama"), tmp_path / "source")
    with pytest.raises(ValueError, match="quantization"):
        save_model(model, tmp_path / "saved", like=source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("act_order", [False, True])
def test_expanding_changes_nothing(tmp_path, act_order):
    model = quantize_decoder(tiny_decoder("llama", mlp_bias=True), 3, act_order=act_order)
    source = write_folder(model, tmp_path / "source", settings(3))
    dense = load_model(source, weights="dense")
    assert isinstance(dense.layers.q, Dense) and isinstance(load_model(source).layers.q, Quantized)
    assert close(dense(tiny_ids(model)), model(tiny_ids(model)))


def _bits(words: np.ndarray, bits: int) -> np.ndarray:
    """Values along the first axis of uint32 words, read bit by bit as the format is described."""
    stream = (
        words[:, None].astype(np.uint64) >> np.arange(32, dtype=np.uint64)[:, None]
    ) & np.uint64(1)
    stream = stream.reshape(-1, bits, words.shape[1])
    return (stream << np.arange(bits, dtype=np.uint64)[:, None]).sum(1)


@pytest.mark.parametrize("version", GPTQ_FORMS)
@pytest.mark.parametrize("bits", BITS)
def test_files_hold_the_documented_layout(tmp_path, bits, version):
    model = quantize_decoder(tiny_decoder("llama"), bits, act_order=True)
    folder = write_folder(model, tmp_path / "model", settings(bits, version))
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.1.mlp.down_proj."
    words, packed_zeros = (tensors[prefix + k].view(np.uint32) for k in ("qweight", "qzeros"))
    zeros = _bits(packed_zeros.T, bits).T.astype(np.int64)
    if version == "gptq":
        zeros = (zeros + 1) % 2**bits
    group = tensors[prefix + "g_idx"]
    scales = tensors[prefix + "scales"].astype(np.float32)
    matrix = scales[group] * (_bits(words, bits).astype(np.int64) - zeros[group])
    np.testing.assert_array_equal(matrix.astype(np.float32), model.layers.down.dense()[1])


def test_symmetric_zeros_are_the_words_known_from_other_packers():
    weight = random_quantized(64, 32, 4)
    weight.zeros[...] = jnp.full((2, 32), 8, jnp.uint8)
    for version, word in (("gptq", 0x77777777), ("gptq_v2", 0x88888888)):
        assert (gptq.from_weight("q_proj", weight, version)["qzeros"].view(np.uint32) == word).all()


def test_pytorch_pickles_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    model = tiny_decoder("opt")
    source = write_folder(model, tmp_path / "model")
    tensors = {k: torch.tensor(v) for k, v in load_file(source / "model.safetensors").items()}
    (source / "model.safetensors").unlink()
    # OPT's oldest checkpoints have no leading "model.", and carry the tied head.
    old = {name.removeprefix("model."): value for name, value in tensors.items()}
    torch.save(
        old | {"lm_head.weight": tensors["model.decoder.embed_tokens.weight"]},
        source / "pytorch_model.bin",
    )
    assert_same(load_model(source), model)
    (source / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    parts = {"a.bin": names[::2], "b.bin": names[1::2]}
    for file, held in parts.items():
        torch.save({name: tensors[name].bfloat16() for name in held}, source / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), model)
    assert_same(load_model(source), half)
