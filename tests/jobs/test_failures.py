"""One line for whatever ends a command, and a file with the story where it is not our own."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from idp_jax.config import ConfigError
from idp_jax.config.files import read_yaml
from idp_jax.jobs.failures import explained, lost_a_process
from idp_jax.jobs.files import naming, read_json, write_file


def raised(action) -> BaseException:
    """What an action raises."""
    with pytest.raises(BaseException) as caught:
        action()
    return caught.value


def fail(error: BaseException) -> None:
    raise error


class OfALibrary(Exception):
    """As safetensors and orbax have them: the system's words, and no code."""


FULL = "I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OfALibrary(FULL), ValueError(FULL)],
    ids=["system", "library", "value"],
)
def test_a_full_disk_names_the_file(tmp_path, error):
    file = tmp_path / "model.safetensors"
    said, status = explained(raised(lambda: write_file(file, lambda path: fail(error))))
    assert said == f"{file}: No space left on device; make room, and give the same command again"
    assert status == 1 and not list(tmp_path.iterdir())
    # Where nobody named it, the result is named.
    assert explained(raised(lambda: fail(error)), tmp_path)[0].startswith(f"{tmp_path}: No space")


def test_a_process_that_lost_another_says_so(monkeypatch):
    error = RuntimeError("FAILED_PRECONDITION: Gloo all-reduce failed: Connection closed by peer")
    assert not lost_a_process(error)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    assert lost_a_process(error) and not lost_a_process(RuntimeError("INTERNAL: a bug"))
    said, status = explained(error)
    assert said.startswith("another process of this job has ended or cannot be reached (FAILED_")
    assert said.endswith("give the same command again in all of them") and status == 1


@pytest.mark.parametrize("code", [errno.EROFS, errno.EFBIG, errno.EDQUOT])
def test_other_refusals_of_a_disk(tmp_path, code):
    def write() -> None:
        with naming(tmp_path / "a"):
            try:
                raise OSError(code, os.strerror(code))
            except OSError as error:
                raise OfALibrary("cannot write") from error

    said, status = explained(raised(write))
    assert said.startswith(f"{tmp_path / 'a'}: {os.strerror(code)}; ") and status == 1
    with pytest.raises(OfALibrary, match="^other$"), naming("a"):
        raise OfALibrary("other")


UNEXPECTED = {
    "type": (lambda: len(3), "TypeError: object of type 'int' has no len()"),
    "json": (lambda: json.loads("{"), "JSONDecodeError: Expecting property name"),
    "deep": (lambda: json.loads("[" * 10**6), "a file that was read nests too deeply"),
    "memory": (lambda: fail(MemoryError()), "out of memory (MemoryError); take smaller batches"),
    "lines": (lambda: fail(RuntimeError("a\n  b")), "RuntimeError: a b"),
}


@pytest.mark.parametrize(("action", "message"), UNEXPECTED.values(), ids=UNEXPECTED)
def test_what_nobody_expected_is_kept_in_a_file(tmp_path, monkeypatch, action, message):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said, status = explained(raised(action))
    assert status == 1 and said.startswith(message) and "\n" not in said
    (kept,) = tmp_path.iterdir()
    assert said.endswith(f"; the traceback is in {kept}")
    assert "Traceback (most recent call last)" in kept.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert explained(raised(action))[0].startswith(message)


def test_our_own_errors_say_it_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert explained(raised(lambda: fail(ConfigError("a\nb")))) == ("a b", 2)
    from idp_jax.formats import load_model

    assert explained(raised(lambda: load_model(tmp_path / "m")))[1] == 2
    for read in (lambda: (tmp_path / "a\0b").read_text(), lambda: (tmp_path / "\0").mkdir()):
        said, status = explained(raised(read))
        assert "NUL" in said and status == 2
    missing = FileNotFoundError(errno.ENOENT, "No such file", "a/b")
    assert explained(missing) == ("a/b: No such file", 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff\xfe", b"[" * 10**6], ids=range(4))
def test_damaged_files_of_our_own_are_named(tmp_path, text):
    file = tmp_path / "result.json"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=r"result\.json is damaged \(.*\); remove it"):
        read_json(file, "remove it")
    with pytest.raises(ConfigError, match=r"result\.json (is not YAML|holds no settings)"):
        read_yaml(file)


LEFT = """
import sys
from idp_jax.jobs.failures import calm_streams

with calm_streams():
    for number in range(20_000):
        print("said", number)
        print("said", number, file=sys.stderr)
    open(sys.argv[1], "w").close()
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_work_goes_on_when_its_reader_has_left(tmp_path, stream):
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: subprocess.PIPE}
    done = tmp_path / "done"
    process = subprocess.Popen([sys.executable, "-c", LEFT, str(done)], **streams)
    pipe = getattr(process, stream)
    pipe.readline()
    pipe.close()
    assert process.wait(60) == 0 and done.is_file()


def test_a_command_whose_reader_has_left_ends_well():
    root = Path(__file__).parents[2]
    call = "from idp_jax.cli import main; main(['train', '--help'])"
    process = subprocess.Popen(
        [sys.executable, "-c", call], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    with process.stderr as said:
        assert said.read() == b"" and process.wait(60) == 0


def test_a_link_to_itself_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    link = tmp_path / "link"
    link.symlink_to(link)
    for action in (lambda: link.resolve(strict=True), lambda: (link / "a").stat()):
        said, status = explained(raised(action))
        assert str(link) in said and status in (1, 2)
        assert "Error" not in said and "traceback" not in said


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "r.json").mkdir()
    action = lambda: write_file(tmp_path / "r.json", lambda path: pytest.fail("written"))
    wanted = f"{tmp_path / 'r.json'}: Is a directory; a file belongs there; move the folder away"
    assert explained(raised(action)) == (wanted, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
