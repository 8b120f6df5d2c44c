"""What cannot be trained is refused before a model is loaded."""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from idp_jax import formats
from idp_jax.config import Data, Lora, Mesh, Teacher, Train
from idp_jax.data.batch import Batch
from idp_jax.data.stream import TrainingText
from idp_jax.recover import LoraAdapter, PrefixAdapter, SoftPrompt
from idp_jax.training import fit, next_token, train
from idp_jax.training.checks import check, check_positions
from tests.helpers import tiny_decoder, tiny_folder

POSITIONS = 64


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two models and a text."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("llama", "opt"):
        tiny_folder(folder / name, name, num_layers=1, max_positions=POSITIONS)
    (folder / "text.txt").write_text("tide and ship " * 200)
    return folder


def settings(files, out, *, model="opt", data=None, **changes) -> Train:
    """A run of windows of 32 tokens that could start but for the changes."""
    parts = {"train": str(files / "text.txt"), "sequence_length": 32, **(data or {})}
    fields = {"model": str(files / model), "out": out, "tokens": 128, "prompt_length": 8}
    return Train(**{**fields, "data": Data(**parts), **changes})


BAD = {
    "no-source": ({"data": {"train": None}}, r"--data.train is missing: give a \.txt or \.jsonl"),
    "no-text": ({"data": {"train": "none.txt"}}, r"no text file none\.txt"),
    "no-validation": ({"data": {"validation": "none.jsonl"}}, r"no text file none\.jsonl"),
    "no-teacher": ({"data": {"train": "self"}, "teacher": Teacher("/none")}, "no model at /none"),
    "prompt": ({"prompt_length": 40}, r"sequence-length 32 behind a prompt of 40 .* 24 at most"),
    "prefix": ({"method": "prefix", "prompt_length": 33}, "behind a prompt of 33 exceeds .* 64 le"),
    "pool": ({"method": "idp", "pool_lengths": (4, 60)}, "behind a prompt of 60 .* 4 at most"),
    "window": (
        {"method": "lora", "tokens": 130, "data": {"sequence_length": 65}},
        "length 65 exceeds .* 64 at most",
    ),
    "long-prompt": ({"model": "llama", "prompt_length": 65}, "prompt length 65 is out of range"),
    "long-pool": (
        {"model": "llama", "method": "idp", "pool_lengths": (2, 65)},
        "prompt length 65 is out of range",
    ),
    "target": ({"method": "lora", "lora": Lora(targets=("gate",))}, "no matrix 'gate'"),
    "batch": ({"mesh": Mesh(data=8)}, "--batch-size 2 does not divide .* 8 devices; .*of 8"),
    "batch-fsdp": (
        {"mesh": Mesh(data=2, fsdp=2, model=2), "batch_size": 6, "tokens": 999},
        "--batch-size 6 does not divide over the mesh's data x fsdp = 4 devices",
    ),
    "devices": ({"mesh": Mesh(data=3)}, "does not use 8 devices"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_it_is_refused_before_anything_is_loaded(files, tmp_path, monkeypatch, changes, message):
    def load(*args, **options):
        pytest.fail("loaded")

    monkeypatch.setattr(formats, "load_model", load)
    monkeypatch.setattr(formats, "load_tokenizer", load)
    with pytest.raises(ValueError, match=message) as caught:
        train(settings(files, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["llama", "opt"])
@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"prompt_length": 32}, 32 * 64),
        ({"method": "idp", "pool_lengths": (3, 32)}, 35 * 64),
        ({"method": "lora", "lora": Lora(rank=2, targets=("q",))}, 4 * 64),
    ],
)
def test_what_fits_is_counted(files, model, changes, count):
    assert check(settings(files, Path("run"), model=model, **changes), None) == count


def test_rotary_positions_have_no_end(files):
    changes = {"data": {"sequence_length": 10 * POSITIONS}, "tokens": 10**6}
    assert check(settings(files, Path("run"), model="llama", **changes), None) == 8 * 64


@pytest.mark.parametrize(
    ("kind", "room"), [(SoftPrompt, 60), (PrefixAdapter, 60), (LoraAdapter, POSITIONS)]
)
def test_positions_of_an_adapter(kind, room):
    decoder = tiny_decoder("opt", num_layers=1, max_positions=POSITIONS)
    adapter = kind.init(decoder, 4, jax.random.key(0))
    check_positions(adapter, decoder, room)
    with pytest.raises(ValueError, match=f"64 learned positions; give {room} at most"):
        check_positions(adapter, decoder, room + 1)


def test_the_loop_refuses_it_too(files):
    """For those who call it without a configuration."""
    decoder = tiny_decoder("opt", num_layers=1, max_positions=POSITIONS, vocab_size=259)
    text = TrainingText.open(
        str(files / "text.txt"),
        formats.load_tokenizer(files / "opt"),
        POSITIONS,
        validation=None,
        validation_windows=2,
        seed=0,
    )
    with pytest.raises(ValueError, match="behind a prompt of 4 exceeds"):
        fit(
            SoftPrompt.init(decoder, 4, jax.random.key(0)),
            decoder,
            next_token,
            optimizer=None,
            batches=text.batches(2),
            validation=text.validation_batches(2),
            steps=1,
            evaluate_every=1,
        )


@pytest.mark.parametrize("model", ["llama", "opt"])
@pytest.mark.parametrize("part", ["train", "validation"])
def test_tokens_outside_the_vocabulary_are_refused(files, tmp_path, monkeypatch, model, part):
    """Of a tokenizer that is larger than the embedding, before the model is loaded."""
    monkeypatch.setattr(formats, "load_model", lambda *args, **options: pytest.fail("loaded"))
    tiny_folder(tmp_path / "small", model, num_layers=1, max_positions=POSITIONS, vocab_size=230)
    (tmp_path / "other.txt").write_text("\u00df" * 900)  # its second byte is token 256
    data = {part: str(tmp_path / "other.txt")}
    with pytest.raises(ValueError, match="is outside the vocabulary of 230; use the tokenizer"):
        train(settings(files, tmp_path / "run", model=str(tmp_path / "small"), data=data))
    assert not (tmp_path / "run").exists()


class Endless:
    """One batch again and again."""

    def __init__(self, batch):
        self.batch = batch

    def __next__(self):
        return self.batch

    def state(self):
        return {}


@pytest.mark.parametrize("held_out", [False, True])
def test_the_loop_refuses_tokens_too(files, held_out):
    decoder = tiny_decoder("llama", num_layers=1, vocab_size=259)
    good, bad = (Batch(np.full((1, 8), token, np.int32)) for token in (5, 259))
    with pytest.raises(ValueError, match="token id 259 is outside the vocabulary of 259"):
        fit(
            SoftPrompt.init(decoder, 4, jax.random.key(0)),
            decoder,
            next_token,
            optax.sgd(1e-3),
            batches=Endless(good if held_out else bad),
            validation=[good, bad] if held_out else [good],
            steps=1,
            evaluate_every=1,
        )
