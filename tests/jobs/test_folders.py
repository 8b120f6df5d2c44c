"""Folders and files of long jobs: complete or absent, and one configuration each."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from idp_jax.config import ConfigError
from idp_jax.jobs.files import fingerprint, write_file, write_text
from idp_jax.jobs.folder import check_absent, claim, release, written_folder
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


def test_a_fingerprint_is_of_the_models_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing of the model")
    assert fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert fingerprint(tmp_path) != before
