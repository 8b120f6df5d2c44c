"""What stands in a model's folder beside its weights: ends of text, sidecars, tokenizer."""

import json

import numpy as np
import pytest

from idp_jax import load_model, load_tokenizer, save_model
from idp_jax.compression.job import compress
from idp_jax.config import Compress, Convert
from idp_jax.formats import CheckpointError
from idp_jax.formats.convert import convert
from tests.formats.test_bad_input import edit_config, refused
from tests.helpers import tiny_folder

DEEP = b'{"a":' * 100_000


@pytest.fixture
def folder(tmp_path):
    return tiny_folder(tmp_path / "model")


def generation_config(folder, **settings):
    (folder / "generation_config.json").write_text(json.dumps(settings))


class TestStopIds:
    """generation_config.json ends a text, as in transformers' `generate`."""

    @pytest.mark.parametrize(
        "eos",
        [7, [2, 9, 11], [], None, [2, 9_999], -1],
        ids=["one", "many", "no", "null", "far", "-1"],
    )
    def test_they_are_those_of_transformers(self, folder, eos):
        generation_config(folder, bos_token_id=1, **({} if eos is None else {"eos_token_id": eos}))
        from transformers import GenerationConfig

        theirs = GenerationConfig.from_pretrained(folder).eos_token_id
        theirs = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
        assert list(load_model(folder).config.eos_token_ids) == theirs

    def test_config_json_is_asked_where_the_file_is_absent(self, folder):
        edit_config(folder, eos_token_id=[2, 5])
        assert load_model(folder).config.eos_token_ids == (2, 5)

    @pytest.mark.parametrize("eos", ["2", 2.5, True, {"a": 1}, [[2]], [None]])
    @pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
    def test_what_is_no_token(self, folder, eos, file):
        generation_config(folder)
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | {"eos_token_id": eos}))
        refused(lambda: load_model(folder), "eos_token_id", file)

    @pytest.mark.parametrize("data", [b"{", b"[]", b"\xff\xfe{}", DEEP])
    def test_a_damaged_file(self, folder, data):
        (folder / "generation_config.json").write_bytes(data)
        refused(lambda: load_model(folder), "generation_config.json", kind=CheckpointError)


FILES = {
    "generation_config.json": '{"eos_token_id": [2, 5]}',
    "chat_template.jinja": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "special_tokens_map.json": '{"bos_token": "<s>"}',
    "LICENSE.txt": "a licence",
    "License": "a licence",
    "license.md": "a licence",
    "Notice.txt": "a notice",
    "NOTICE": "a notice",
    "USE_POLICY.md": "a policy",
    "README.md": "a card",
}
LEFT = ("optimizer.pt", "model.py", "training_args.bin", "notes.txt")


class TestSidecars:
    """Whoever writes a model carries what belongs to it."""

    @pytest.fixture
    def full(self, folder):
        (folder / "additional_chat_templates").mkdir()
        for name, text in FILES.items():
            (folder / name).write_text(text)
        for name in LEFT:
            (folder / name).write_text("not of the model")
        return folder

    @pytest.mark.parametrize("writer", ["save", "convert", "compress"])
    def test_they_are_carried_byte_by_byte(self, full, tmp_path, writer):
        out = tmp_path / "out"
        if writer == "save":
            save_model(load_model(full), out, like=full)
        elif writer == "convert":
            convert(Convert(model=str(full), to="dense", out=out))
        else:
            compress(Compress(model=str(full), out=out, method="rtn", group_size=32))
        for name in (*FILES, "tokenizer.json", "tokenizer_config.json"):
            assert (out / name).read_bytes() == (full / name).read_bytes()
        assert not [name for name in LEFT if (out / name).exists()]
        assert load_model(out).config.eos_token_ids == (2, 5)
        message = [{"role": "user", "content": "hello"}]
        texts = [
            load_tokenizer(f).apply_chat_template(message, tokenize=False) for f in (full, out)
        ]
        assert texts == ["hello", "hello"]


@pytest.mark.parametrize("data", [b"{", b"3", b"\xff\xfe{}", DEEP, b""])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(folder, data, name):
    (folder / name).write_bytes(data)
    read = load_model if name == "config.json" else load_tokenizer
    refused(lambda: read(folder), str(folder), name)


class TestCustomCode:
    """Code of a model's own is not run, and nobody is asked."""

    @pytest.fixture(autouse=True)
    def nobody_answers(self, monkeypatch):
        def asked(*_):
            raise AssertionError("a question was asked")

        monkeypatch.setattr("builtins.input", asked)

    def test_an_architecture_that_only_it_defines(self, folder):
        edit_config(folder, model_type="mine", auto_map={"AutoConfig": "configuration.Mine"})
        (folder / "configuration.py").write_text("raise SystemExit('this code was run')")
        refused(lambda: load_model(folder), "config.json", "custom code", "AutoConfig")

    def test_a_tokenizer_that_only_it_defines(self, folder):
        file = folder / "tokenizer_config.json"
        own = {
            "tokenizer_class": "Mine",
            "auto_map": {"AutoTokenizer": ["tokenization.Mine", None]},
        }
        file.write_text(json.dumps(json.loads(file.read_text()) | own))
        (folder / "tokenization.py").write_text("raise SystemExit('this code was run')")
        refused(lambda: load_tokenizer(folder), "tokenizer_config.json", "custom code")

    def test_a_known_architecture_is_read_as_transformers_does(self, folder):
        before = np.asarray(load_model(folder)([[5, 6, 7]]))
        edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Mine"})
        (folder / "modeling.py").write_text("raise SystemExit('this code was run')")
        assert np.array_equal(load_model(folder)([[5, 6, 7]]), before)


def test_compressing_with_a_tokenizer_larger_than_the_embedding(tmp_path):
    folder = tiny_folder(tmp_path / "model", vocab_size=96)
    text = tmp_path / "text.txt"
    text.write_text("é and other letters beyond the first\n\n" * 50)
    settings = Compress(
        model=str(folder),
        out=tmp_path / "out",
        group_size=32,
        calibration=str(text),
        samples=2,
        sequence_length=16,
    )
    refused(lambda: compress(settings), "vocabulary of 96")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
