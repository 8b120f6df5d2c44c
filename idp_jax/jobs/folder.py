"""Folders of long jobs: one configuration each, complete or under another name.

A folder appears under its name only when it is complete: everything is written beside it and
renamed. What it replaces was written by this software, and stays until the new one has its name. A
job goes on only in the folder that holds its own configuration, with the contents that it read
before, and no second one works there.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from idp_jax.config import ConfigError
from idp_jax.config.files import to_dict
from idp_jax.config.places import check_apart, check_not_working
from idp_jax.jobs.files import naming, write_text
from idp_jax.jobs.lock import lock_file, locked
from idp_jax.jobs.marker import MARKER, foreign, is_marked, mark

_SETTINGS = "config.yaml"
Inputs = dict[str, dict[str, str]]


def claim(
    out: Path,
    settings: Any,
    *,
    free: tuple[str, ...] = ("out",),
    why: Mapping[str, str] = {},
    inputs: Inputs | None = None,
) -> None:
    """Writes the configuration to `out`/config.yaml, or checks that the job there has the same.

    Args:
        free: settings that may change from call to call, such as "out" or "teacher.cache".
        why: reasons, by setting, that a user may not see by himself.
        inputs: the fingerprints of what the job reads, by its name; see `files.fingerprint`.

    Raises:
        ConfigError: the folder holds something else, a job with another configuration, or one that
            read other contents.
    """
    wanted = to_dict(settings) | {"inputs": inputs or {}}
    file = out / _SETTINGS
    if not file.is_file():
        if out.exists() and (not out.is_dir() or _names(out)):
            raise ConfigError(f"{out} exists and holds no run of this kind; give another --out")
        write_text(file, yaml.safe_dump(wanted, sort_keys=False))
        return
    found = _read_settings(file)
    for key, before, now in differences(found, wanted, (*free, "inputs")):
        reason = f" ({why[key]})" if key in why else ""
        raise ConfigError(
            f"{out} holds a run with {key} = {before!r}, this one has {now!r}{reason}; give "
            "another --out, or remove the folder"
        )
    _check_inputs(out, found.get("inputs"), wanted["inputs"])


def differences(found: Any, wanted: Any, free: Iterable[str]) -> list[tuple[str, Any, Any]]:
    """The settings in which two trees differ, (name, in the one, in the other), but for `free`.

    Two names of one file are alike.
    """
    before, now = _flat(found), _flat(wanted)
    free = tuple(free)
    held = lambda key: any(key == name or key.startswith(f"{name}.") for name in free)
    return [
        (key, before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if not held(key) and not _alike(before.get(key), now.get(key))
    ]


def _alike(before: Any, now: Any) -> bool:
    if isinstance(before, str) and isinstance(now, str) and before != now:
        with suppress(OSError, ValueError):  # no names of files, or none that are here
            return os.path.samefile(before, now)
    return before == now


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by their whole names, such as teacher.model."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    dot = f"{prefix}." if prefix else ""
    flat = (_flat(value, f"{dot}{key}") for key, value in tree.items())
    return {key: value for part in flat for key, value in part.items()}


def _check_inputs(out: Path, found: Any, wanted: Inputs) -> None:
    """Refuses contents that are not those that the run in the folder read."""
    if not isinstance(found, dict):
        raise ConfigError(
            f"{out} holds a run of an earlier version, which did not note what it read; give "
            "another --out, or remove the folder"
        )
    for name in wanted:
        before, now = found.get(name), wanted[name]
        if before == now:
            continue
        before = before if isinstance(before, dict) else {}
        file = next(key for key in sorted({*before, *now}) if before.get(key) != now.get(key))
        raise ConfigError(
            f"{out} holds a run that read another {name}: {file} has changed since; give another "
            "--out, or remove the folder"
        )


def _read_settings(file: Path) -> dict[str, Any]:
    remedy = f"remove {file.parent}, or give another --out"
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file} is damaged ({reason}); {remedy}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} is damaged (it holds no settings); {remedy}")
    return found


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {lock_file(folder, inside=True).name}


def release(out: Path) -> None:
    """Takes a claim back where the job wrote nothing else: one that cannot start leaves nothing."""
    if _names(out) == {_SETTINGS}:
        (out / _SETTINGS).unlink()
        with suppress(OSError):  # its lock is still there, and goes with it
            out.rmdir()


@contextmanager
def run_folder(out: Path, settings: Any, **conditions: Any) -> Iterator[None]:
    """Claims a folder for a run and keeps other jobs out of it until the block ends.

    Args:
        conditions: as of `claim`.

    Raises:
        ConfigError: as of `claim`, or another job works there.
    """
    if out.is_symlink() and not out.exists():
        raise ConfigError(f"{out} is a link that leads nowhere; give another --out")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} exists and holds no run of this kind; give another --out")
    with ExitStack() as held:
        # Also where jobs that replace the whole folder have theirs; of a mounted disk that may not
        # be writable, but then nothing there can be replaced.
        with suppress(OSError):
            held.enter_context(locked(out))
        held.enter_context(locked(out, inside=True))
        claim(out, settings, **conditions)
        try:
            yield
        except (ValueError, OSError):
            release(out)
            raise


def settled(out: Path) -> Path:
    """The same place under a name that holds when the folder there is moved."""
    # A link at the end stays one, and is refused.
    return out.parent.resolve() / out.name if ".." in out.parent.parts else out


def check_writable(out: str | Path, needed: int = 0) -> None:
    """Refuses a place that cannot take a job's result, before the job has cost anything.

    Args:
        out: a file or folder that is to be written; it need not exist, nor its parents.
        needed: bytes that it will take at least.

    Raises:
        ConfigError: nothing can be written there, or the disk has less room.
    """
    place = Path(out).absolute()
    while not place.is_dir():
        if place.exists() and place != Path(out).absolute():
            raise ConfigError(f"{out} cannot be written: {place} is a file; give another --out")
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".idp-jax-"):
            pass
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written ({place}: {error.strerror}); give another --out"
        ) from error
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ConfigError(
            f"{out} needs {needed / 1e9:.3g} GB, the disk of {place} has {free / 1e9:.3g} GB free; "
            "make room, or give another --out"
        )


def check_absent(
    out: str | Path, *, overwrite: bool = False, sources: dict[str, Any] | None = None
) -> None:
    """Refuses a place where something stands that may not be replaced.

    Args:
        overwrite: a folder that is as this software wrote it may be replaced.
        sources: what is read, by name; see `places.check_apart`.

    Raises:
        ValueError: `out` is not an empty folder, nor one that may be replaced.
    """
    out = Path(out)
    check_apart(out, sources or {})
    if not out.exists() and not out.is_symlink():
        return
    check_not_working(out)
    if out.is_symlink():
        raise ValueError(f"{out} is a link; give the folder that it stands for, or another --out")
    if out.is_dir() and not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{out} exists; give another folder, or --overwrite")
    if not is_marked(out):
        raise ValueError(
            f"{out} was not written by idp-jax (it holds no {MARKER}), so it is not replaced; give "
            "another --out, or remove it yourself"
        )
    added = foreign(out)
    if added is not None:
        raise ValueError(
            f"{out} holds {added}, which was added or changed since idp-jax wrote the folder, so "
            "it is not replaced; move that file, or give another --out"
        )


@contextmanager
def written_folder(
    out: Path, *, overwrite: bool = False, sources: dict[str, Any] | None = None
) -> Iterator[Path]:
    """A folder to write into that takes its name only when the block ends without an error.

    Args:
        overwrite, sources: as of `check_absent`.

    Raises:
        ValueError: `out` stands and may not be replaced, or came to stand there meanwhile, or
            another job writes there.
        OSError: the disk takes no more.
    """
    out = settled(Path(out))
    check_apart(out, sources or {})
    with locked(out):
        recover(out)
        check_absent(out, overwrite=overwrite, sources=sources)
        partial = out.with_name(f".{out.name}.partial")
        _remove(partial)
        with naming(out):
            try:
                partial.mkdir()
                mark(partial)  # what a killed process leaves is known as ours, too
                yield partial
                mark(partial)
                check_absent(out, overwrite=overwrite, sources=sources)
                put(partial, out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)


def put(new: Path, out: Path) -> None:
    """Gives a complete and marked folder its name; what stood there goes only then.

    The caller has made sure by `check_absent` that it may go.
    """
    old = _aside(out)
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    _remove(old)


def recover(out: Path) -> None:
    """Ends a replacement in which a process was killed: back to the old one, or on to the new."""
    old = _aside(out)
    if old.exists() and not out.exists():
        old.rename(out)
    _remove(old)


def _aside(out: Path) -> Path:
    """Where the old folder waits while the new one takes its name."""
    return out.with_name(f".{out.name}.replaced")


def _remove(folder: Path) -> None:
    """Removes a folder that this software wrote, its marker last."""
    if not folder.exists():
        return
    if any(folder.iterdir()) and not is_marked(folder):
        raise ValueError(f"{folder} is in the way, and idp-jax did not write it; move it")
    for entry in folder.iterdir():
        if entry.name != MARKER:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    shutil.rmtree(folder)
