"""Where results may not go: onto, into or around what is read, nor onto what is somebody's own."""

import os
from pathlib import Path

import pytest

from idp_jax.config import Compress, ConfigError, Convert, Corpora, Demo, Evaluate, Sweep, Train
from idp_jax.config.recovery import Data, Teacher
from idp_jax.jobs.folder import check_absent, put, recover, written_folder
from idp_jax.jobs.marker import MARKER, changed, foreign, mark

COMMANDS = {
    "compress": lambda model, out: Compress(model=model, out=out),
    "convert": lambda model, out: Convert(model=model, out=out, to="dense"),
    "train": lambda model, out: Train(model=model, out=out),
    "eval": lambda model, out: Evaluate(model=model, out=out, latency=True),
    "demo": lambda model, out: Demo(model=model, out=out),
    "sweep": lambda model, out: Sweep(
        model=model, out=out, data=Corpora("hub:c4", Path("held.jsonl")), recipes={"a": {}}
    ),
}


@pytest.fixture
def model(tmp_path):
    """A folder with a file, two folders deep."""
    folder = tmp_path / "models" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def tree(folder: Path) -> list[tuple[str, str]]:
    """Every file and what it holds."""
    return sorted((str(f), f.read_text()) for f in folder.rglob("*") if f.is_file())


@pytest.mark.parametrize("make", COMMANDS.values(), ids=COMMANDS)
def test_no_command_writes_onto_into_or_around_its_model(model, make):
    link = model.parent.parent / "link"
    link.symlink_to(model)
    for name in (model, link):
        for out, relation in (
            (model, "is"),
            (model.parent, "holds"),
            (model / "a" / "b", "lies in"),
        ):
            with pytest.raises(ConfigError, match=rf"--out \S+ {relation} the model"):
                make(str(name), out)
    assert make(str(model), model.parent / "other").out
    with pytest.raises(ConfigError, match="--out org/name is the model org/name"):
        make("org/name", Path("org/name"))
    assert make("org/name", Path("other")).out


def test_every_source_counts(model, tmp_path):
    text = tmp_path / "text" / "a.txt"
    text.parent.mkdir()
    text.write_text("tide")
    with pytest.raises(ConfigError, match=r"--out \S+ holds the calibration"):
        Compress(model="m", calibration=str(text), out=text.parent)
    for part in ("train", "validation"):
        with pytest.raises(ConfigError, match=rf"--out \S+ holds the data\.{part}"):
            Train(model="m", out=text.parent, data=Data(**{part: str(text)}))
    for part in ("model", "cache"):
        with pytest.raises(ConfigError, match=rf"--out \S+ holds the teacher\.{part}"):
            Train(model="m", out=text.parent, teacher=Teacher(**{part: str(text)}))
    with pytest.raises(ConfigError, match=r"--out \S+ is the text"):
        Evaluate(model="m", perplexity=text, out=text)
    with pytest.raises(ConfigError, match=r"--out \S+ lies in the adapter"):
        Evaluate(model="m", perplexity=text, adapter=model, out=model / "r.json")
    with pytest.raises(ConfigError, match=r"--out \S+ lies in the task-data"):
        Demo(model="m", task_data=model, out=model / "demo")
    assert Train(model="m", out="self", data=Data(train="self")).out
    # A model's files may be links to where they really are, as in the hub's cache.
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_text("weights")
    (model / "model.safetensors").symlink_to(tmp_path / "blobs" / "abc")
    with pytest.raises(ConfigError, match=r"--out \S+blobs holds the model"):
        Convert(model=str(model), out=tmp_path / "blobs", to="dense")


def test_working_folders_are_no_place_for_a_result(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "a" / "b")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for out in (".", "..", tmp_path / "a", tmp_path / "home", tmp_path, "/"):
        with pytest.raises(ConfigError, match="is or holds the folder"):
            Compress(model="m", out=Path(out))
        with pytest.raises(ConfigError, match="is or holds the folder"):
            check_absent(out, overwrite=True)
    assert Compress(model="m", out=Path("c")).out


NOT_OURS = {
    "folder": (lambda out: (out / "letter").write_text("dear"), "was not written by idp-jax"),
    "added": (
        lambda out: (mark(out), (out / "sub").mkdir(), (out / "sub" / "n").write_text("mine")),
        "holds sub/n, which was added",
    ),
    "linked": (
        lambda out: (mark(out), (out / "n").symlink_to("/etc")),
        "holds n, which was added",
    ),
    "marker": (lambda out: (out / MARKER).write_text("[]"), "was not written by idp-jax"),
}


@pytest.mark.parametrize(("fill", "message"), NOT_OURS.values(), ids=NOT_OURS)
def test_what_is_not_ours_is_not_replaced(tmp_path, fill, message):
    out = tmp_path / "out"
    out.mkdir()
    fill(out)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=message) as error, written_folder(out, overwrite=True):
        pytest.fail("nothing is begun")
    assert "\n" not in str(error.value) and tree(tmp_path) == before


def test_links_and_files_are_not_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    mark(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    for name in ("link", "dangling"):
        with pytest.raises(ValueError, match=f"{name} is a link"):
            check_absent(tmp_path / name, overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file was not written by idp-jax"):
        check_absent(tmp_path / "file", overwrite=True)
    assert (tmp_path / "real" / MARKER).is_file()


def old_and_new(tmp_path) -> tuple[Path, Path]:
    """A result under its name and one that shall replace it."""
    for name in ("out", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
        mark(tmp_path / name)
    return tmp_path / "out", tmp_path / "new"


@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_replacement_that_was_killed_can_be_ended(tmp_path, monkeypatch, call):
    """Before each of its steps: the old one is there, or back, until the new one is in place."""
    out, new = old_and_new(tmp_path)
    own, calls = Path.rename, iter(range(9))

    def rename(path, target):
        if next(calls) == call:
            raise KeyboardInterrupt
        return own(path, target)

    def remove(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        patch.setattr("idp_jax.jobs.folder._remove", remove)
        with pytest.raises(KeyboardInterrupt):
            put(new, out)
    recover(out)
    assert (out / "which").read_text() == ("new" if call == 2 else "out")
    assert {p.name for p in tmp_path.iterdir()} == ({"out"} if call == 2 else {"out", "new"})


def test_a_new_one_that_cannot_take_its_name_leaves_the_old(tmp_path, monkeypatch):
    out, new = old_and_new(tmp_path)
    own = Path.rename

    def rename(path, target):
        if path == new:
            raise OSError(5, "Input/output error")
        return own(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        put(new, out)
    assert (out / "which").read_text() == "out"


def test_what_a_killed_write_left_is_cleared_and_what_is_not_ours_stays(tmp_path):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    partial.mkdir()
    mark(partial)
    (partial / "half").write_text("half")
    with written_folder(out) as folder:
        assert folder == partial and not (folder / "half").exists()
        (folder / "whole").write_text("whole")
    assert os.listdir(tmp_path) == ["out"]
    partial.mkdir()
    (partial / "letter").write_text("dear")
    with (
        pytest.raises(ValueError, match=r"\.out\.partial is in the way"),
        written_folder(out, overwrite=True),
    ):
        pytest.fail("nothing is begun")
    assert (partial / "letter").read_text() == "dear" and (out / "whole").is_file()


def test_a_marker_knows_what_was_written_with_it(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a").write_text("a")
    mark(tmp_path)
    assert changed(tmp_path) is None and foreign(tmp_path) is None
    (tmp_path / "part" / "a").write_text("b")
    (tmp_path / "part" / "b").write_text("b")
    assert changed(tmp_path) == "part/a" and foreign(tmp_path) == "part/a"
    (tmp_path / "part" / "a").unlink()
    assert changed(tmp_path) == "part/a" and foreign(tmp_path) == "part/b"
    (tmp_path / "part" / "b").unlink()
    assert foreign(tmp_path) is None


@pytest.mark.parametrize("marked", [True, False])
def test_what_comes_to_stand_in_a_place_meanwhile_is_not_replaced(tmp_path, marked):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="out exists; give another folder"), written_folder(out):
        out.mkdir()
        (out / "letter").write_text("dear")
        if marked:
            mark(out)
    assert (out / "letter").read_text() == "dear" and os.listdir(tmp_path) == ["out"]


def test_a_place_may_be_named_by_itself(tmp_path):
    """Once the folder is moved, what is named through it is nowhere."""
    for text in ("old", "new"):
        with written_folder(tmp_path / "out" / ".." / "out", overwrite=True) as folder:
            (folder / "file").write_text(text)
        assert (tmp_path / "out" / "file").read_text() == text
    assert os.listdir(tmp_path) == ["out"]
