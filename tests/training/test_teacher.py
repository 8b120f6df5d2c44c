"""The teacher beside a training: from the command's settings, on a mesh, and from its cache."""

import json
import os
from dataclasses import replace

import jax
import numpy as np
import pytest

from idp_jax import formats
from idp_jax.config import ConfigError, Data, Init, Lora, Teacher, Train
from idp_jax.data.batch import Batch
from idp_jax.jobs.files import contents
from idp_jax.recover import Repaired
from idp_jax.recover.replaced import with_parameters
from idp_jax.sharding import make_mesh, shard, shard_batch
from idp_jax.training import cache as cache_module
from idp_jax.training import make_objective, teacher, train
from idp_jax.training.cache import Cache, window_keys
from tests.helpers import close, tiny_decoder, tiny_folder, tiny_ids

LENGTH = 16  # tokens of a window


pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Models of one vocabulary and of others, and a text of about 40 windows."""
    folder = tmp_path_factory.mktemp("files")
    tiny_folder(folder / "model", num_layers=1)
    tiny_folder(folder / "dense", num_layers=1, seed=1)
    tiny_folder(folder / "third", num_layers=1, seed=2)
    tiny_folder(folder / "wide", num_layers=1, seed=1, hidden_dim=96)
    tiny_folder(folder / "larger", num_layers=1, vocab_size=300)
    tiny_folder(folder / "renamed", num_layers=1)
    file = folder / "renamed" / "tokenizer.json"
    known = json.loads(file.read_text())
    vocabulary = known["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(known))
    words = np.random.default_rng(0).choice(["tide ", "ship ", "lamp "], 130)
    (folder / "text.txt").write_text("".join(words))
    return folder


def settings(files, out, *, data=None, **changes) -> Train:
    """A run of four steps beside the teacher `dense`; its fields by keyword, form= and cache=."""
    names = ("form", "cache", "temperature")
    asked = {"model": str(files / "dense"), "tokens": 8}
    asked |= {name: changes.pop(name) for name in names if name in changes}
    parts = {"train": str(files / "text.txt"), "sequence_length": LENGTH, "validation_windows": 2}
    fields = {
        **{"model": str(files / "model"), "out": out, "batch_size": 2, "evaluate_every": 2},
        **{"tokens": 4 * 2 * LENGTH, "prompt_length": 4, "objective": "kl"},
        **{"teacher": Teacher(**asked), "data": Data(**{**parts, **(data or {})})},
    }
    return Train(**{**fields, **changes})


def rows_of(folder) -> list[dict]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(config: Train) -> list[float]:
    """Trains, and gives the loss of every step."""
    train(config)
    return [row["loss"] for row in rows_of(config.out) if "loss" in row]


@pytest.mark.parametrize("form", ["full", "topk", "sampled"])
def test_the_teacher_is_heard_and_its_terms_are_logged(files, tmp_path, form):
    config = settings(files, tmp_path / "run", form=form, objective="kl + 0.5*ce + hidden_mse")
    train(config)
    steps = [row for row in rows_of(config.out) if "loss" in row]
    assert len(steps) == 4
    for row in steps:
        parts = row["kl"] + 0.5 * row["ce"] + row["hidden_mse"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5) and row["kl"] > 0
    assert "teacher.model" in (config.out / "config.yaml").read_text()


def test_the_divergence_goes_down(files, tmp_path):
    config = settings(files, tmp_path / "run")
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=3e-2))
    found = losses(replace(config, tokens=40 * 2 * LENGTH))
    assert np.mean(found[-8:]) < np.mean(found[:8])


@pytest.mark.parametrize("form", ["full", "topk", "sampled"])
def test_from_the_cache_training_is_the_same_bit_for_bit(files, tmp_path, form, monkeypatch):
    alone = settings(files, tmp_path / "alone", form=form)
    first = settings(files, tmp_path / "first", form=form, cache=tmp_path / "cache")
    expected = losses(alone)
    load, loaded = formats.load_model, []
    counted = lambda path, **options: loaded.append(path) or load(path, **options)
    monkeypatch.setattr(formats, "load_model", counted)
    assert losses(first) == expected and loaded.count(str(files / "dense")) == 1
    before = contents(tmp_path / "cache")
    assert "cache.json" in before and f"windows-{LENGTH}.bin" in before

    monkeypatch.setattr(teacher, "hear", lambda *a, **o: pytest.fail("the teacher runs again"))
    loaded.clear()
    again = settings(files, tmp_path / "again", form=form, cache=tmp_path / "cache")
    assert losses(again) == expected
    # Of hidden states the teacher's head makes logits; the short forms need nothing of it.
    assert loaded.count(str(files / "dense")) == (1 if form == "full" else 0)
    other = settings(files, tmp_path / "lora", form=form, cache=tmp_path / "cache", method="lora")
    assert len(losses(other)) == 4  # another method, the same text
    assert contents(tmp_path / "cache") == before


def test_hidden_states_of_the_cache_serve_every_term(files, tmp_path):
    asked = {"objective": "kl + hidden_mse", "temperature": 2.0}
    alone = losses(settings(files, tmp_path / "alone", **asked))
    # At another temperature: hidden states are the same.
    losses(settings(files, tmp_path / "first", cache=tmp_path / "cache"))
    assert losses(settings(files, tmp_path / "cached", cache=tmp_path / "cache", **asked)) == alone


def test_a_term_of_ones_own_reads_from_the_cache(files, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def far(logits, positions):\n    return positions.teacher.divergence(logits)\n"
    )
    asked = {"objective": f"{tmp_path / 'mine.py'}:far", "cache": tmp_path / "cache"}
    found = losses(settings(files, tmp_path / "own", **asked))
    assert found == losses(settings(files, tmp_path / "kl"))
    asked |= {"form": "topk", "cache": tmp_path / "short"}
    short = losses(settings(files, tmp_path / "own-short", **asked))
    assert short == losses(settings(files, tmp_path / "kl-short", form="topk")) != found


def test_eora_and_cross_entropy_use_the_teacher(files, tmp_path):
    lora = Lora(rank=2, start="eora", windows=2)
    assert losses(settings(files, tmp_path / "run", objective="ce", method="lora", lora=lora))


def test_a_cache_is_shared_by_batches_of_another_size_and_order(files, tmp_path, monkeypatch):
    form = {"form": "topk", "cache": tmp_path / "cache"}
    everything = 60 * 2 * LENGTH  # some epochs: every window is there
    losses(replace(settings(files, tmp_path / "first", **form), tokens=everything))
    monkeypatch.setattr(teacher.Teacher, "decoder", property(lambda self: pytest.fail("loaded")))
    losses(replace(settings(files, tmp_path / "other", **form), batch_size=4, seed=7))


BAD = {
    "missing": ({"teacher": Teacher()}, "kl needs a teacher; give .* --teacher.model"),
    "hidden": ({"teacher": Teacher(), "objective": "ce + cka"}, "cka needs a teacher"),
    "unknown": ({"objective": "kd"}, "no term 'kd'; there are ce, kl, hidden_mse, cka"),
    "absent": ({"teacher": Teacher("/none")}, "no model at /none"),
    "unused": ({"objective": "ce"}, "dense is never asked: --objective 'ce' needs no teacher"),
    "never-read": (
        {"cache": "c", "objective": "ce", "init": Init(model="teacher"), "method": "prefix"},
        "--teacher.cache c is never read: --objective 'ce' needs no teacher",
    ),
    "no-model": (
        {"objective": "ce", "teacher": Teacher(cache="c")},
        "--teacher.cache c needs its --teacher.model",
    ),
    "not-kl": (
        {"cache": "c", "form": "topk", "objective": "kl + hidden_mse"},
        "--teacher.cache c of --teacher.form topk keeps what kl needs, and nothing else",
    ),
    "tokens": ({"teacher": 300}, "--teacher.tokens 300 is more than the vocabulary's 259"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_it_is_refused_before_anything_is_loaded(files, tmp_path, monkeypatch, changes, message):
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(formats, name, lambda *args, **options: pytest.fail("loaded"))
    if changes.get("teacher") == 300:
        changes = {"teacher": Teacher(str(files / "dense"), form="topk", tokens=300)}
    config = settings(files, tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        train(config)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "objective", "message"),
    [
        ("larger", "kl", "larger has another vocabulary than .*: 300 tokens, not 259"),
        ("renamed", "kl", "renamed has another vocabulary"),
        ("wide", "hidden_mse", "wide has hidden states of 96, .*model of 64; give --objective kl"),
    ],
)
def test_a_teacher_of_another_model_is_refused(
    files, tmp_path, monkeypatch, name, objective, message
):
    monkeypatch.setattr(formats, "load_model", lambda *a, **o: pytest.fail("loaded"))
    config = settings(files, tmp_path / "run", objective=objective)
    config = replace(config, teacher=Teacher(str(files / name)))
    with pytest.raises(ConfigError, match=message):
        train(config)


def test_another_teachers_cache_is_refused(files, tmp_path):
    first = settings(files, tmp_path / "first", form="sampled", cache=tmp_path / "cache")
    losses(first)
    for number, (changes, message) in enumerate(
        [
            ({"model": str(files / "third")}, "written with another teacher; give another folder"),
            ({"form": "topk"}, r"another form \(sampled, not topk\)"),
            ({"tokens": 9}, r"another tokens \(8, not 9\)"),
            ({"temperature": 2.0}, r"another temperature \(1.0, not 2.0\)"),
        ]
    ):
        config = replace(
            first, out=tmp_path / f"{number}", teacher=replace(first.teacher, **changes)
        )
        with pytest.raises(ConfigError, match=message) as caught:
            train(config)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"another seed \(0, not 1\)"):
        train(replace(first, out=tmp_path / "seeded", seed=1))


SHAPES = {"ids": (np.uint16, 3), "rest": (np.float32, 0)}


def make_rows(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Fields that follow from the tokens."""
    ids = np.repeat(tokens[..., None], 3, -1).astype(np.uint16)
    return {"ids": ids, "rest": tokens.astype(np.float32) / 7}


def open_cache(folder, **identity) -> Cache:
    """A cache of windows of four tokens."""
    return Cache(folder, {"teacher": {"a": "b"}, **identity}, 4, SHAPES)


def never() -> dict:
    """What asks a teacher that is not there."""
    pytest.fail("asked")


def windows(count: int, seed: int = 0) -> np.ndarray:
    """int32 [count, 4]."""
    return np.random.default_rng(seed).integers(0, 100, (count, 4)).astype(np.int32)


def test_records_come_back_in_any_order(tmp_path):
    tokens = windows(5)
    keys = window_keys(tokens)
    with_double = np.concatenate([tokens[:2], tokens[:1]])
    open_cache(tmp_path).rows(window_keys(with_double), lambda: make_rows(with_double))
    open_cache(tmp_path).rows(keys[1:], lambda: make_rows(tokens[1:]))
    found = open_cache(tmp_path).rows(keys[::-1], never)
    for name, right in make_rows(tokens[::-1]).items():
        assert (found[name] == right).all()
    size = (tmp_path / "windows-4.bin").stat().st_size
    assert size == 5 * (32 + 4 * 3 * 2 + 4 * 4 + 4)  # each once


@pytest.mark.parametrize("lost", [1, 30, 75])
def test_a_torn_record_is_dropped_and_written_again(tmp_path, lost):
    tokens = windows(3)
    keys = window_keys(tokens)
    open_cache(tmp_path).rows(keys, lambda: make_rows(tokens))
    file = tmp_path / "windows-4.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-lost])
    asked = []

    def ask():
        asked.append(1)
        return make_rows(tokens)

    open_cache(tmp_path).rows(keys[:2], never)
    open_cache(tmp_path).rows(keys, ask)
    assert file.read_bytes() == whole and asked == [1]


def test_a_damaged_record_is_not_believed(tmp_path):
    tokens = windows(2)
    open_cache(tmp_path).rows(window_keys(tokens), lambda: make_rows(tokens))
    file = tmp_path / "windows-4.bin"
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="is damaged; remove it, and the teacher is asked again"):
        open_cache(tmp_path).rows(window_keys(tokens), never)


def test_two_jobs_share_a_cache(tmp_path):
    """Each finds what the other wrote meanwhile, and nothing is written twice."""
    tokens = windows(6)
    keys = window_keys(tokens)
    one, two = open_cache(tmp_path), open_cache(tmp_path)

    def ask_while_the_other_writes():
        two.rows(keys[2:], lambda: make_rows(tokens[2:]))
        return make_rows(tokens[:4])

    one.rows(keys[:4], ask_while_the_other_writes)
    assert (two.rows(keys, never)["ids"] == make_rows(tokens)["ids"]).all()
    assert (tmp_path / "windows-4.bin").stat().st_size == 6 * (32 + 4 * 3 * 2 + 4 * 4 + 4)


def test_a_full_disk_is_one_line_and_what_was_written_stays(tmp_path, monkeypatch):
    tokens = windows(3)
    keys = window_keys(tokens)
    cache = open_cache(tmp_path)
    cache.rows(keys[:1], lambda: make_rows(tokens[:1]))
    full = lambda record: (_ for _ in ()).throw(OSError(28, os.strerror(28)))
    monkeypatch.setattr(cache_module, "_checksum", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        cache.rows(keys, lambda: make_rows(tokens))
    assert caught.value.filename == str(tmp_path / "windows-4.bin")
    monkeypatch.undo()
    assert (cache.rows(keys[:1], never)["ids"] == make_rows(tokens[:1])["ids"]).all()


def test_segments_are_part_of_a_window(tmp_path):
    tokens = windows(1)
    first, same, other = (np.asarray([row]) for row in ([0, 0, 1, 1], [4, 4, 5, 5], [0, 1, 1, 1]))
    assert window_keys(tokens, first) == window_keys(tokens, same)
    assert window_keys(tokens, first) != window_keys(tokens, other) != window_keys(tokens)


@pytest.mark.parametrize("form", ["full", "topk", "sampled"])
@pytest.mark.parametrize("shape", [{"data": 4, "model": 2}, {"data": 2, "fsdp": 2, "model": 2}])
def test_on_a_mesh_the_word_and_the_gradient_are_the_same(files, form, shape):
    config = settings(files, "run", form=form)
    student = tiny_decoder(seed=3, vocab_size=259)
    tokens = np.asarray(tiny_ids(student, batch=4, time=LENGTH))
    tokenizer = formats.load_tokenizer(config.model)
    objective = make_objective("kl + 0.5*ce + hidden_mse" if form == "full" else "kl + ce")

    def run(mesh):
        asked = teacher.Teacher(config, tokenizer, mesh=mesh)
        batch = asked.attach(shard_batch(Batch(tokens), mesh))
        placed = shard(student, mesh)

        def loss(scale, decoder, batch):
            changed = with_parameters(decoder, {"final_norm.scale": scale})
            return objective(Repaired(changed), batch)[0]

        step = jax.jit(jax.value_and_grad(loss))
        value, slope = step(student.final_norm.scale[...], placed, batch)
        return batch, float(value), np.asarray(slope)

    _, expected, right = run(None)
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        batch, value, slope = run(mesh)
    assert value == pytest.approx(expected, abs=1e-5) and close(slope, right, 1e-5)
    said = batch.teacher.hidden if form == "full" else batch.teacher.kept.ids
    places = said.sharding.devices_indices_map(said.shape).values()
    rows = {index.indices(4)[:2] for index, *_ in places}
    assert len(rows) == 4  # cut like the batch, not gathered
