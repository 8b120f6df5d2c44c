"""One job at a time in a place, whichever process it is of, and for no longer than it lives."""

import os
import subprocess
import sys

import pytest

from idp_jax.config import ConfigError
from idp_jax.jobs.lock import lock_file, locked

HOLD = """
import sys, time
from idp_jax.jobs.lock import locked

with locked(sys.argv[1], inside=sys.argv[2] == "inside"):
    print("held", flush=True)
    time.sleep(60)
"""


def held_elsewhere(out, place: str) -> subprocess.Popen:
    """A process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out), place], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_a_second_job_is_told_who_holds_the_place(tmp_path, place):
    out = tmp_path / "runs" / "a"
    process = held_elsewhere(out, place)
    said = rf"a is being written by process {process.pid} on {os.uname().nodename}; wait"
    try:
        with pytest.raises(ConfigError, match=said), locked(out, inside=place == "inside"):
            pytest.fail("both write")
        assert lock_file(out, inside=place == "inside").is_file()
    finally:
        process.kill()
        process.communicate()
    # Death lets go of it, and whoever comes next leaves nothing.
    with locked(out, inside=place == "inside"):
        pass
    assert not list(out.parent.rglob("*lock"))


def test_a_lock_leaves_nothing_behind(tmp_path):
    with locked(tmp_path / "a" / "b" / "out"), locked(tmp_path / "a" / "b" / "other"):
        pass
    with locked(tmp_path / "run", inside=True):
        assert (tmp_path / "run").is_dir()
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "kept", inside=True):
        (tmp_path / "kept" / "file").touch()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["file"]


def test_a_place_is_one_under_any_of_its_names(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with locked(tmp_path / "real" / "out"), pytest.raises(ConfigError, match="being written"):
        with locked(tmp_path / "link" / "out"):
            pytest.fail("both write")
