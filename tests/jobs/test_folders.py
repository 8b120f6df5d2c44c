"""Folders and files of long jobs: complete or absent, and one configuration each."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from idp_jax.config import ConfigError
from idp_jax.jobs.files import fingerprint, write_file, write_text
from idp_jax.jobs.folder import (
    check_absent,
    claim,
    differences,
    release,
    run_folder,
    written_folder,
)
from idp_jax.jobs.marker import MARKER


@dataclass(frozen=True)
class Settings:
    """Of a job that does nothing."""

    seed: int = 0
    out: Path = Path("out")


def test_a_claim_holds_for_one_configuration(tmp_path):
    out = tmp_path / "job"
    claim(out, Settings())
    claim(out, Settings(out=Path("moved")))
    with pytest.raises(ConfigError, match="holds a run with seed = 0, this one has 1; give"):
        claim(out, Settings(seed=1))
    release(out)
    assert not out.exists()


def test_settings_differ_by_their_whole_names():
    found = {"lora": {"rank": 2}, "teacher": {"cache": None, "model": "m"}, "rates": [1, 2]}
    wanted = {"lora": {"rank": 4}, "teacher": {"cache": "c", "model": "m"}, "rates": [1, 2], "x": 0}
    assert differences(found, wanted, ("teacher.cache",)) == [("lora.rank", 2, 4), ("x", None, 0)]
    assert differences(found, wanted, ("teacher", "lora", "x")) == []
    assert differences(found, found, ()) == []


def test_two_names_of_one_file_are_one_setting(tmp_path, monkeypatch):
    (tmp_path / "text").touch()
    (tmp_path / "other").touch()
    monkeypatch.chdir(tmp_path)
    found = {"data": {"train": "text"}, "name": "kl"}
    assert differences(found, {"data": {"train": str(tmp_path / "text")}, "name": "kl"}, ()) == []
    assert differences(found, {"data": {"train": "other"}, "name": "kl"}, ()) == [
        ("data.train", "text", "other")
    ]
    assert differences(found, {"data": {"train": "gone"}, "name": "ce\0"}, ()) == [
        ("data.train", "text", "gone"),
        ("name", "kl", "ce\0"),
    ]


def test_a_claim_that_led_to_something_stays(tmp_path):
    claim(tmp_path / "job", Settings())
    (tmp_path / "job" / "file").touch()
    release(tmp_path / "job")
    assert (tmp_path / "job" / "config.yaml").is_file()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ConfigError, match="other exists and holds no run of this kind"):
        claim(tmp_path / "other", Settings())


def test_a_folder_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "result"
    with pytest.raises(RuntimeError), written_folder(out) as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with written_folder(out) as folder:
        (folder / "whole").touch()
        assert not out.exists()
    assert {path.name for path in out.iterdir()} == {"whole", MARKER}
    with pytest.raises(ValueError, match="result exists; give another folder, or --overwrite"):
        check_absent(out)
    with written_folder(out, overwrite=True) as folder:
        (folder / "new").touch()
    assert {path.name for path in out.iterdir()} == {"new", MARKER}
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_file_appears_when_it_is_complete(tmp_path):
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError

    write_text(tmp_path / "sub" / "file", "whole")
    with pytest.raises(OSError):
        write_file(tmp_path / "sub" / "file", fail)
    assert os.listdir(tmp_path / "sub") == ["file"]
    assert (tmp_path / "sub" / "file").read_text() == "whole"


def test_a_claim_holds_for_what_was_read(tmp_path):
    out, read = tmp_path / "job", {"model": {"a.json": "1", "b.model": "2"}, "text": {"t": "3"}}
    claim(out, Settings(), inputs=read)
    claim(out, Settings(), inputs=read)
    for other, said in (
        ({"model": {"a.json": "1", "b.model": "0"}}, "another model: b.model has changed since"),
        ({"model": {"a.json": "1"}}, "another model: b.model has changed since"),
        ({"model": {**read["model"], "c": "4"}}, "another model: c has changed since"),
        ({"text": {"u": "3"}}, "another text: t has changed since"),
    ):
        with pytest.raises(ConfigError, match=said):
            claim(out, Settings(), inputs=read | other)
    settings = yaml.safe_load((out / "config.yaml").read_text())
    del settings["inputs"]
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match="of an earlier version, which did not note what it read"):
        claim(out, Settings(), inputs=read)


@pytest.mark.parametrize("text", ["{", "- 1", "a: [", "\0", "[" * 5000], ids=range(5))
def test_damaged_settings_are_named(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged .*; remove .* or give another"):
        claim(tmp_path, Settings())


def test_a_run_keeps_others_out_and_leaves_nothing_if_it_cannot_start(tmp_path):
    out = tmp_path / "runs" / "job"
    with pytest.raises(ValueError, match="too short"), run_folder(out, Settings()):
        with (
            pytest.raises(ConfigError, match="being written by process"),
            run_folder(out, Settings()),
        ):
            pytest.fail("two at once")
        raise ValueError("too short")
    assert not list(tmp_path.iterdir())
    with run_folder(out, Settings()):
        (out / "step").touch()
    assert {path.name for path in out.iterdir()} == {"config.yaml", "step"}


def test_a_fingerprint_tells_contents_apart(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    files = ("model.safetensors", "config.json", "merges.txt", "tokenizer.model", "chat.jinja")
    for name in (*files, "notes.txt", ".hidden.json"):
        (model / name).write_bytes(b"0" * 100)
    before = fingerprint(model)
    assert set(before) == set(files)
    for name in files:
        (model / name).write_bytes(b"0" * 50 + b"1" + b"0" * 49)
        after = fingerprint(model)
        assert {key for key in files if before[key] != after[key]} == {name}
        (model / name).write_bytes(b"0" * 100)
    (model / "notes.txt").write_text("other")
    assert fingerprint(model) == before
    assert fingerprint(model / "notes.txt") != fingerprint(model / "merges.txt")
    assert fingerprint("hub:c4") == fingerprint("self") == {}
    # Of large weights samples are read: their size, both ends, and a part of every stretch.
    for name, size in (("_WHOLE", 1000), ("_STEP", 500), ("_BLOCK", 200)):
        monkeypatch.setattr(f"idp_jax.jobs.files.{name}", size)
    large = tmp_path / "large.gguf"
    digests = set()
    for place in (None, 0, 499, 600, 1100, 4700, 4999):
        data = bytearray(5000)
        if place is not None:
            data[place] = 1
        large.write_bytes(data)
        digests.add(fingerprint(large)["large.gguf"])
    large.write_bytes(bytes(5001))
    assert len(digests | {fingerprint(large)["large.gguf"]}) == 8


def test_a_run_and_what_would_replace_its_folder_exclude_each_other(tmp_path):
    out = tmp_path / "out"
    with (
        run_folder(out, Settings()),
        pytest.raises(ConfigError, match="out is being written by process"),
        written_folder(out),
    ):
        pytest.fail("both write")
    other = tmp_path / "other"
    with (
        written_folder(other),
        pytest.raises(ConfigError, match="other is being written by process"),
        run_folder(other, Settings()),
    ):
        pytest.fail("both write")
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_a_link_that_leads_nowhere_is_no_place_for_a_run(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with (
        pytest.raises(ConfigError, match="out is a link that leads nowhere; give another --out"),
        run_folder(tmp_path / "out", Settings()),
    ):
        pytest.fail("it begins")
