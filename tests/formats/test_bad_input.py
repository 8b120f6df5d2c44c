"""Every bad input is refused in one line that names the value, and leaves nothing behind."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from idp_jax import load_model, load_tokenizer, save_model
from idp_jax.formats import CheckpointError, write
from idp_jax.formats.quantization import Packing, write_config
from idp_jax.formats.source import open_source
from tests.helpers import quantize_decoder, tiny_decoder, tiny_ids, write_folder

SETTINGS = write_config("gptq_v2", {"q_proj": Packing(4, 32, False)})


@pytest.fixture
def folder(tmp_path):
    return write_folder(tiny_decoder("llama", tied_embeddings=True), tmp_path / "model")


def refused(what, *words: str, kind=ValueError) -> None:
    """`what()` raises one line that holds all of these words."""
    with pytest.raises(kind) as caught:
        what()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def edit_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def shard(folder) -> dict[str, str]:
    """Cuts the folder's file into three with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {}
    for number in range(3):
        part = dict(list(sorted(tensors.items()))[number::3])
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


@pytest.mark.parametrize("name", ["missing/../folder", "./nothing", "/no/such/folder", "nothing"])
def test_missing_folder(name):
    refused(lambda: load_model(name), name, "give", kind=CheckpointError)


def test_unreachable_hub_name():
    refused(
        lambda: load_model("nobody/no-model"),
        "nobody/no-model",
        "local folder",
        kind=CheckpointError,
    )


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.txt").write_text("text")
    refused(lambda: load_model(tmp_path / "model.txt"), "model.txt", ".gguf")


def test_folder_without_config(tmp_path):
    refused(lambda: load_model(tmp_path), "config.json", "give the folder")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_damaged_config(folder, text):
    (folder / "config.json").write_text(text)
    refused(lambda: load_model(folder), "config.json")


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(lambda: load_model(folder), "holds no .safetensors", kind=CheckpointError)
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    refused(lambda: load_model(folder), "pytorch_model.bin.index.json", kind=CheckpointError)


def test_missing_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(
        lambda: load_model(folder),
        "model-00002-of-00003.safetensors is missing",
        "fetch",
        kind=CheckpointError,
    )


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_truncated_shard(folder, kept):
    shard(folder)
    file = folder / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(lambda: load_model(folder), file.name, "cut short", "fetch", kind=CheckpointError)


@pytest.mark.parametrize("text", ['{"weight_map": {"a"', "{}", "[]", '{"weight_map": 3}'])
def test_damaged_index(folder, text):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(lambda: load_model(folder), "model.safetensors.index.json", kind=CheckpointError)


def test_shard_without_a_listed_tensor(folder):
    places = shard(folder)
    file = folder / "model-00001-of-00003.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, file)
    assert places[lost] == file.name
    refused(lambda: load_model(folder), lost, file.name, "fetch", kind=CheckpointError)


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"],
)
def test_missing_tensor(folder, name):
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    refused(lambda: load_model(folder), f"lacks the tensor {name}", kind=CheckpointError)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.input_layernorm.weight",
    ],
)
def test_wrong_shape(folder, name):
    def cut(tensors):
        tensors[name] = np.ascontiguousarray(tensors[name][:-1])

    edit_tensors(folder, cut)
    refused(
        lambda: load_model(folder),
        name,
        "63" if "norm" in name else "64)",
        "config.json",
        kind=CheckpointError,
    )


def test_wrong_number_of_positions(tmp_path):
    folder = write_folder(tiny_decoder("opt"), tmp_path / "opt")
    edit_config(folder, max_position_embeddings=100)
    refused(lambda: load_model(folder), "embed_positions", "(258, 64)", "(102, 64)")


def test_a_tensor_of_no_use(folder):
    edit_tensors(
        folder,
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": np.ones(4)}),
    )
    refused(lambda: load_model(folder), "model.layers.0.self_attn.q_norm.weight", "no use")


def test_a_bias_that_the_configuration_denies(folder):
    edit_tensors(
        folder, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": np.ones(96)})
    )
    refused(lambda: load_model(folder), "up_proj.bias", "config.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, ["'gpt2'", "llama, opt"]),
        ({"model_type": "no-such-model"}, ["config.json", "no-such-model"]),
        ({"hidden_act": "tanh"}, ["'tanh'", "silu"]),
        ({"num_key_value_heads": 3}, ["3", "4"]),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
            ["'yarn'", "default, linear, dynamic, llama3"],
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
            ["partial_rotary_factor", "'default'"],
        ),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ["factor", "linear"]),
    ],
)
def test_unsupported_configuration(folder, changes, words):
    edit_config(folder, **changes)
    refused(lambda: load_model(folder), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 5}, ["5-bit", "2, 3, 4, 8"]),
        ({"bits": None}, ["None-bit", "2, 3, 4, 8"]),
        ({"quant_method": "awq"}, ["'awq'", "gptq, compressed-tensors"]),
        ({"checkpoint_format": "marlin"}, ["'marlin'", "gptq, gptq_v2"]),
        ({"pack_dtype": "int8"}, ["'int8'", "int32"]),
        ({"dynamic": {"-:.*q_proj": {}}}, ["layers.0.self_attn.q_proj is packed"]),
        ({"dynamic": {"+:.*(q_proj": {}}}, [".*(q_proj", "regular expression"]),
        ({"dynamic": {"+:.*q_proj": {"bits": 7}}}, ["7-bit"]),
        ({"bits": 8}, ["q_proj.qweight", "8 bits"]),
    ],
)
@pytest.mark.parametrize("place", ["config.json", "quantize_config.json"])
def test_unsupported_packing(tmp_path, changes, words, place):
    settings = SETTINGS
    folder = write_folder(quantize_decoder(tiny_decoder("llama"), 4), tmp_path / "model", settings)
    if place == "config.json":
        edit_config(folder, quantization_config=settings | changes)
    else:
        edit_config(folder, quantization_config=None)
        (folder / place).write_text(json.dumps(settings | changes))
    refused(lambda: load_model(folder), *words)


def test_packed_without_settings(tmp_path):
    settings = SETTINGS
    folder = write_folder(quantize_decoder(tiny_decoder("llama"), 4), tmp_path / "model", settings)
    edit_config(folder, quantization_config=None)
    refused(lambda: load_model(folder), "q_proj", "quantization_config")


@pytest.mark.parametrize(
    ("key", "value"), [("checkpoint_format", "gptq"), ("bits", 8), ("sym", True)]
)
def test_two_files_that_contradict_each_other(tmp_path, key, value):
    folder = write_folder(quantize_decoder(tiny_decoder("llama"), 4), tmp_path / "model", SETTINGS)
    (folder / "quantize_config.json").write_text(json.dumps(SETTINGS | {key: value}))
    refused(lambda: load_model(folder), f"config.json says {key}", "quantize_config.json")


def test_settings_of_packing_beside_a_dense_model_say_nothing(folder):
    ids = tiny_ids(tiny_decoder("llama"), 1, 4)
    before = load_model(folder)(ids)
    (folder / "quantize_config.json").write_text(json.dumps(SETTINGS))
    assert (load_model(folder)(ids) == before).all()
    assert open_source(folder).quantization is None


def test_numbers_beyond_a_type_are_not_written(folder, tmp_path):
    model = load_model(folder)
    kernel = model.layers.up.kernel
    model.layers.up.kernel = kernel[...].at[1, 0, :3].set(1e30).astype(jnp.float16)
    refused(
        lambda: save_model(model, tmp_path / "out", like=folder),
        "model.layers.1.mlp.up_proj.weight would hold 3 numbers of",
        "beyond float16",
    )
    assert not (tmp_path / "out").exists()


def test_groups_that_do_not_exist(tmp_path):
    settings = SETTINGS
    folder = write_folder(quantize_decoder(tiny_decoder("llama"), 4), tmp_path / "model", settings)

    def beyond(tensors):
        tensors["model.layers.0.self_attn.q_proj.g_idx"][5] = 2

    edit_tensors(folder, beyond)
    refused(
        lambda: load_model(folder),
        "model.layers.0.self_attn.q_proj.g_idx",
        "2 groups",
        "group_size",
    )


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_no_tokenizer(tmp_path, architecture):
    folder = write_folder(tiny_decoder(architecture), tmp_path / "model")
    refused(lambda: load_tokenizer(folder), "no tokenizer", str(folder))


@pytest.mark.parametrize("dtype", ["float31", "int8"])
def test_unknown_dtype(folder, dtype):
    refused(lambda: load_model(folder, dtype=dtype), dtype, "float32")


class TestOutput:
    """Writing is all or nothing."""

    def test_existing_folder_is_kept(self, folder, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        (out / "precious").write_text("text")
        model = load_model(folder)
        refused(lambda: save_model(model, out, like=folder), str(out), "exists", "--overwrite")
        write = lambda: save_model(model, out, like=folder, overwrite=True)
        refused(write, str(out), "was not written by idp-jax")
        assert [file.name for file in out.iterdir()] == ["precious"]
        (out / "precious").unlink()
        write()
        (out / "config.json").unlink()
        write()
        assert (out / "config.json").is_file()
        (out / "precious").write_text("text")
        refused(write, str(out), "precious")
        assert (out / "precious").read_text() == "text"
        self.assert_clean(tmp_path)

    def test_empty_folder_is_used(self, folder, tmp_path):
        (tmp_path / "out").mkdir()
        save_model(load_model(folder), tmp_path / "out", like=folder)
        assert (tmp_path / "out" / "model.safetensors").is_file()
        self.assert_clean(tmp_path)

    @pytest.mark.parametrize("existing", [False, True])
    def test_failure_leaves_nothing(self, folder, tmp_path, monkeypatch, existing):
        out = tmp_path / "deeper" / "out"
        if existing:
            save_model(load_model(folder), out, like=folder)
        before = sorted(out.rglob("*"))

        def disk_full(*_):
            raise OSError("no space left on device")

        monkeypatch.setattr(write.Shards, "close", disk_full)
        with pytest.raises(OSError, match="no space"):
            save_model(load_model(folder), out, like=folder, overwrite=True)
        assert out.exists() == existing and sorted(out.rglob("*")) == before
        self.assert_clean(tmp_path / "deeper")

    def test_missing_like(self, folder, tmp_path):
        model = load_model(folder)
        refused(lambda: save_model(model, tmp_path / "out", like=tmp_path / "gone"), "gone")
        self.assert_clean(tmp_path)

    @staticmethod
    def assert_clean(folder):
        assert not list(folder.glob(".*"))
