"""What a stopped job finds when it goes on: other contents, damage, a full disk, others' files."""

import shutil
from dataclasses import replace

import pytest

from idp_jax import load_model
from idp_jax.compression.job import compress
from idp_jax.config import ConfigError
from tests.compression.test_job import Stopped, content, settings_of, stop_at


def test_another_text_under_the_same_name(files, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_bytes((files / "text.txt").read_bytes())
    settings = settings_of(files, tmp_path / "out", calibration=str(text))
    with monkeypatch.context() as patch:
        stop_at(patch, "Job._write", 1)
        with pytest.raises(Stopped):
            compress(settings)
    text.write_bytes(text.read_bytes() + b"tide")
    with pytest.raises(ConfigError, match=r"another calibration: text\.txt has changed since"):
        compress(settings)


@pytest.mark.parametrize("name", ["calibration.npy", "layer-00000.json"])
def test_what_is_damaged_of_a_stopped_job_is_named(files, tmp_path, monkeypatch, name):
    settings = settings_of(files, tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_at(patch, "Job._write", 1)
        with pytest.raises(Stopped):
            compress(settings)
    (tmp_path / "out.partial" / name).write_bytes(b"{")
    with pytest.raises(ConfigError, match=f"{name} is damaged .*; remove .*out.partial, and start"):
        compress(settings)


def test_a_replacement_that_was_killed_goes_on(files, tmp_path, monkeypatch):
    """Killed when the old result is put aside and the new one has no name yet."""
    settings = settings_of(files, tmp_path / "out", method="rtn")
    compress(settings)
    before = content(settings.out)
    again = replace(settings, bits=4, overwrite=True)
    with monkeypatch.context() as patch:
        stop_at(patch, "Path.rename", 1)
        with pytest.raises(Stopped):
            compress(again)
    assert not settings.out.exists()
    with pytest.raises(ConfigError, match="holds a run with bits = 4, this one has 2"):
        compress(replace(again, bits=2))
    assert content(settings.out) == before  # back where it was
    compress(again)
    assert load_model(settings.out).layers.q.bits == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_of_somebody_else_is_cleared_away(files, tmp_path):
    settings = settings_of(files, tmp_path / "out", method="rtn")
    compress(settings)
    (tmp_path / "out.partial").mkdir()
    for name in ("config.yaml", "letter.txt"):
        (tmp_path / "out.partial" / name).write_text("a: 1")
    with pytest.raises(ValueError, match="out exists"):
        compress(settings)
    assert len(list((tmp_path / "out.partial").iterdir())) == 2


def test_a_disk_without_the_room_is_found_before_any_work(files, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(ConfigError, match=r"out needs \S+ GB, the disk of \S+ has 1e-09 GB free"):
        compress(settings_of(files, tmp_path / "out"))
    assert not list(tmp_path.iterdir())
