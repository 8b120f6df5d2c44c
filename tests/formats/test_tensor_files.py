"""Which tensors make a model: those that transformers reads, or a refusal."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from idp_jax import load_model, save_model
from idp_jax.compression.job import compress
from idp_jax.config import Compress, Convert
from idp_jax.formats import CheckpointError
from idp_jax.formats.convert import convert
from tests.formats.test_bad_input import edit_config, edit_tensors, refused, shard
from tests.helpers import (
    close,
    quantize_decoder,
    tiny_config,
    tiny_decoder,
    tiny_folder,
    write_folder,
)

IDS = np.random.default_rng(0).integers(3, 128, (2, 9)).astype(np.int32)


def write(folder, seed=0, architecture="llama", **overrides):
    return write_folder(tiny_decoder(architecture, seed=seed, **overrides), folder)


def logits(folder):
    return np.asarray(load_model(folder)(IDS))


def theirs(folder):
    """The logits of transformers' own reading."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(IDS, dtype=torch.long)).logits.numpy()


def assert_as_transformers(folder):
    assert close(logits(folder), theirs(folder), 1e-4)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model")


class TestFiles:
    """What lies beside the named files is not read."""

    def other(self, tmp_path):
        """The tensors of another model of the same shape."""
        return load_file(write(tmp_path / "other", seed=5) / "model.safetensors")

    @pytest.mark.parametrize(
        "name", ["zz.safetensors", "aa.safetensors", "model.fp16.safetensors", "x.bin"]
    )
    def test_a_stray_file_beside_the_model(self, folder, tmp_path, name):
        before = logits(folder)
        save_file(self.other(tmp_path), folder / name)
        assert np.array_equal(logits(folder), before)
        assert_as_transformers(folder)

    def test_a_stray_file_beside_shards(self, folder, tmp_path):
        shard(folder)
        before = logits(folder)
        save_file(self.other(tmp_path), folder / "model-00009-of-00009.safetensors")
        assert np.array_equal(logits(folder), before)

    def test_one_file_goes_before_an_index(self, folder, tmp_path):
        shard(folder)
        save_file(self.other(tmp_path), folder / "model.safetensors", metadata={"format": "pt"})
        assert np.array_equal(logits(folder), logits(tmp_path / "other"))
        assert_as_transformers(folder)

    def test_safetensors_go_before_pickles(self, folder, tmp_path):
        torch = pytest.importorskip("torch")
        before = logits(folder)
        tensors = {k: torch.tensor(v) for k, v in self.other(tmp_path).items()}
        torch.save(tensors, folder / "pytorch_model.bin")
        assert np.array_equal(logits(folder), before)

    def test_a_pickle_goes_before_a_stray_safetensors_file(self, folder, tmp_path):
        torch = pytest.importorskip("torch")
        before = logits(folder)
        tensors = {k: torch.tensor(v) for k, v in load_file(folder / "model.safetensors").items()}
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        save_file(self.other(tmp_path), folder / "adapter_model.safetensors")
        assert np.array_equal(logits(folder), before)
        assert_as_transformers(folder)

    def test_the_file_that_config_json_names(self, folder, tmp_path):
        save_file(self.other(tmp_path), folder / "best.safetensors", metadata={"format": "pt"})
        edit_config(folder, transformers_weights="best.safetensors")
        assert np.array_equal(logits(folder), logits(tmp_path / "other"))
        assert_as_transformers(folder)

    @pytest.mark.parametrize("name", ["../other/model.safetensors", "notes.txt", 3])
    def test_a_named_file_that_cannot_be_it(self, folder, name):
        edit_config(folder, transformers_weights=name)
        refused(lambda: load_model(folder), str(name), "config.json", kind=CheckpointError)

    def test_one_file_of_another_name(self, folder):
        before = logits(folder)
        (folder / "model.safetensors").rename(folder / "gptq_model-4bit.safetensors")
        assert np.array_equal(logits(folder), before)

    def test_a_set_of_shards_without_its_index(self, folder):
        before = logits(folder)
        shard(folder)
        (folder / "model.safetensors.index.json").unlink()
        assert np.array_equal(logits(folder), before)
        (folder / "model-00002-of-00003.safetensors").unlink()
        refused(lambda: load_model(folder), "00001-of", "index", kind=CheckpointError)

    def test_two_files_of_which_none_is_named(self, folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "old.safetensors")
        save_file(tensors, folder / "new.safetensors")
        refused(lambda: load_model(folder), "new.safetensors", "old.safetensors", "index")

    def test_a_tensor_in_two_shards(self, folder):
        shard(folder)
        first, second = (folder / f"model-0000{n}-of-00003.safetensors" for n in (1, 2))
        both = load_file(first)
        name = sorted(both)[0]
        save_file(load_file(second) | {name: both[name]}, second)
        refused(lambda: load_model(folder), name, first.name, second.name)


class TestPlaces:
    """An index names files inside the folder."""

    @pytest.mark.parametrize(
        "place", ["../other/a.safetensors", "/etc/hostname", "", 7, None, "a\0"]
    )
    @pytest.mark.parametrize("index", ["model.safetensors", "pytorch_model.bin"])
    def test_a_place_outside(self, folder, place, index):
        (folder / "model.safetensors").unlink()
        file = folder / f"{index}.index.json"
        file.write_text(json.dumps({"weight_map": {"model.norm.weight": place}}))
        refused(lambda: load_model(folder), file.name, kind=CheckpointError)

    def test_a_folder_below_and_a_link_are_inside(self, folder, tmp_path):
        before = logits(folder)
        places = shard(folder)
        blobs = tmp_path / "blobs"  # as the hub's cache keeps files
        blobs.mkdir()
        (folder / "below").mkdir()
        for file in set(places.values()):
            (folder / file).rename(blobs / file)
            (folder / "below" / file).symlink_to(blobs / file)
        places = {name: f"below/{file}" for name, file in places.items()}
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert np.array_equal(logits(folder), before)
        assert_as_transformers(folder)


class TestTied:
    """The embedding that is the head too may be stored under either name, or under both."""

    HEAD = "lm_head.weight"

    @pytest.fixture(params=["llama", "opt"])
    def tied(self, tmp_path, request):
        return write(tmp_path / "model", architecture=request.param, tied_embeddings=True)

    @staticmethod
    def embedding(tensors):
        return next(name for name in tensors if "embed_tokens" in name)

    def test_under_the_name_of_the_head(self, tied):
        before = logits(tied)
        edit_tensors(tied, lambda t: t.update({self.HEAD: t.pop(self.embedding(t))}))
        assert np.array_equal(logits(tied), before)

    def test_under_both_names_alike(self, tied):
        before = logits(tied)
        edit_tensors(tied, lambda t: t.update({self.HEAD: t[self.embedding(t)].copy()}))
        assert np.array_equal(logits(tied), before)
        assert load_model(tied).head is None

    def test_two_different_tensors_are_two(self, tied, tmp_path):
        head = np.random.default_rng(3).standard_normal((128, 64), np.float32)
        edit_tensors(tied, lambda t: t.update({self.HEAD: head}))
        file = tied / "model.safetensors"
        save_file(load_file(file), file, metadata={"format": "pt"})
        assert_as_transformers(tied)
        save_model(load_model(tied), tmp_path / "out", like=tied)
        assert np.array_equal(logits(tmp_path / "out"), logits(tied))
        assert (
            json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
        )

    def test_an_alias_of_any_shared_tensor(self, folder):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        kept, dropped = (f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1))
        tensors[dropped] = tensors[kept]
        save_file(tensors, file)
        before = logits(folder)
        del tensors[dropped]
        save_file(tensors, file, metadata={"format": "pt", dropped: kept})
        assert np.array_equal(logits(folder), before)


class TestPickles:
    """Whatever form torch wrote the tensors in."""

    @pytest.fixture
    def tensors(self, folder):
        torch = pytest.importorskip("torch")
        file = folder / "model.safetensors"
        found = {name: torch.tensor(value) for name, value in load_file(file).items()}
        file.unlink()
        return found

    @pytest.mark.parametrize("form", ["parameters", "legacy", "legacy parameters", "strided"])
    def test_every_form_is_read(self, folder, tensors, form):
        import torch

        if "parameters" in form:
            tensors = {name: torch.nn.Parameter(value) for name, value in tensors.items()}
        if form == "strided":
            tensors = {n: v.T.contiguous().T if v.ndim == 2 else v for n, v in tensors.items()}
        path = folder / "pytorch_model.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization="legacy" not in form)
        assert_as_transformers(folder)

    def test_code_is_not_run(self, folder, tensors):
        import torch

        torch.save(tensors | {"x": compress}, folder / "pytorch_model.bin")
        refused(lambda: load_model(folder), "pytorch_model.bin", "safetensors")

    @pytest.mark.parametrize("content", [[1, 2], {1: 2}, "text"])
    def test_no_tensors_by_name(self, folder, tensors, content):
        import torch

        torch.save(content, folder / "pytorch_model.bin")
        refused(lambda: load_model(folder), "pytorch_model.bin", "state_dict")

    def test_a_shard_without_a_listed_tensor(self, folder, tensors):
        import torch

        torch.save(tensors, folder / "a.bin")
        index = {"weight_map": dict.fromkeys([*tensors, "model.norm.bias"], "a.bin")}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        refused(lambda: load_model(folder), "a.bin", "model.norm.bias")

    def test_integers_of_two_bytes_stay_integers(self, folder, tensors):
        import torch

        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = (tensors[name] * 100).to(torch.int16)
        torch.save(tensors, folder / "pytorch_model.bin")
        refused(lambda: load_model(folder), name, "int16")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool", "complex64"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_numbers_that_are_no_weights(folder, dtype, name):
    edit_tensors(folder, lambda t: t.update({name: t[name].astype(dtype)}))
    refused(lambda: load_model(folder), name, dtype, kind=CheckpointError)


def test_a_type_that_numpy_does_not_have(folder):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    name, file = "model.layers.0.mlp.up_proj.weight", folder / "model.safetensors"
    tensors = load(file)
    save(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file)
    refused(lambda: load_model(folder), name, "float8", kind=CheckpointError)


class TestFinite:
    """A number that is not finite is named, whoever reads the model."""

    NAME = "model.layers.1.self_attn.k_proj.weight"

    @staticmethod
    def spoil(folder, name, values, dtype=np.float32):
        def change(tensors):
            tensors[name] = tensors[name].astype(dtype)
            tensors[name].reshape(-1)[: len(values)] = values

        edit_tensors(folder, change)
        return folder

    @pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
    @pytest.mark.parametrize("values", [[np.nan], [np.inf, -np.inf, np.nan]])
    def test_in_a_matrix(self, folder, values, dtype):
        self.spoil(folder, self.NAME, values, dtype)
        said = f"{len(values)} of 2048"
        refused(lambda: load_model(folder), self.NAME, said, "not finite", kind=CheckpointError)

    @pytest.mark.parametrize(
        "name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    )
    def test_outside_the_layers(self, folder, name):
        self.spoil(folder, name, [np.nan])
        refused(lambda: load_model(folder), name, "not finite", kind=CheckpointError)

    @pytest.mark.parametrize("method", ["rtn", "magnitude", "gptq", "wanda"])
    def test_no_method_launders_it(self, tmp_path, method):
        folder = self.spoil(tiny_folder(tmp_path / "model"), self.NAME, [np.nan])
        (tmp_path / "text.txt").write_text("some text to calibrate on\n\n" * 100)
        settings = Compress(
            model=str(folder),
            out=tmp_path / "out",
            method=method,
            group_size=32,
            calibration=str(tmp_path / "text.txt"),
            samples=2,
            sequence_length=16,
        )
        refused(lambda: compress(settings), self.NAME, "1 of 2048", kind=CheckpointError)
        assert not (tmp_path / "out").exists()

    def test_no_conversion_launders_it(self, folder, tmp_path):
        self.spoil(folder, self.NAME, [np.inf])
        settings = Convert(model=str(folder), to="sparse-bitmask", out=tmp_path / "out")
        refused(lambda: convert(settings), self.NAME, kind=CheckpointError)
        assert not (tmp_path / "out").exists()

    def test_scales_of_packed_matrices(self, tmp_path):
        from tests.formats.test_bad_input import SETTINGS

        model = quantize_decoder(tiny_decoder("llama"), 4)
        folder = write_folder(model, tmp_path / "model", SETTINGS)
        name = "model.layers.0.mlp.up_proj.scales"
        self.spoil(folder, name, [np.inf], np.float16)
        refused(lambda: load_model(folder), name, "not finite", kind=CheckpointError)

    def test_a_number_that_the_asked_type_cannot_hold(self, folder):
        self.spoil(folder, self.NAME, [1e6])
        assert np.isfinite(logits(folder)).all()
        refused(lambda: load_model(folder, dtype="float16"), self.NAME, "float16", "float32")


def test_sizes_are_not_allocated_before_the_file_is_asked(folder):
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        edit_config(folder, **{key: 2**31 - 64})
        refused(lambda: load_model(folder))
        edit_config(folder, **json.loads(json.dumps({key: _size(key)})))
    assert np.isfinite(logits(folder)).all()


def _size(key):
    config = tiny_config()
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.ffw_dim,
        "num_hidden_layers": config.num_layers,
    }[key]
