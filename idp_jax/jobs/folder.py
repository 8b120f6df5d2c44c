"""Folders of long jobs: one configuration each, complete or under another name.

A folder appears under its name only when it is complete: everything is written beside it and
renamed. A job goes on only in the folder that holds its own configuration.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from idp_jax.config import ConfigError
from idp_jax.config.files import to_dict
from idp_jax.jobs.files import write_text


def claim(
    out: Path,
    settings: Any,
    *,
    free: tuple[str, ...] = ("out",),
    why: Mapping[str, str] = {},
    **facts: str,
) -> None:
    """Writes the configuration to `out`/config.yaml, or checks that the job there has the same.

    Args:
        free: settings that may change from call to call.
        why: reasons, by setting, that a user may not see by himself.
        facts: what else must stay as it is.

    Raises:
        ConfigError: the folder holds something else, or a job with another configuration.
    """
    wanted = {**to_dict(settings), **facts}
    file = out / "config.yaml"
    if not file.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} exists and holds no run of this kind; give another --out")
        write_text(file, yaml.safe_dump(wanted, sort_keys=False))
        return
    found = yaml.safe_load(file.read_text()) or {}
    for key in sorted(set(found) | set(wanted)):
        if key not in free and found.get(key) != wanted.get(key):
            reason = f" ({why[key]})" if key in why else ""
            raise ConfigError(
                f"{out} holds a run with {key} = {found.get(key)!r}, this one has "
                f"{wanted.get(key)!r}{reason}; give another --out, or remove the folder"
            )


def release(out: Path) -> None:
    """Takes a claim back where the job wrote nothing else: one that cannot start leaves nothing."""
    if [path.name for path in out.iterdir()] == ["config.yaml"]:
        (out / "config.yaml").unlink()
        out.rmdir()


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


def check_absent(out: str | Path, *, overwrite: bool = False) -> None:
    """Refuses a place where something stands already.

    Raises:
        ValueError: `out` exists and is not an empty folder.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise ValueError(f"{out} exists; give another folder, or --overwrite")


@contextmanager
def written_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that takes its name only when the block ends without an error.

    Raises:
        ValueError: `out` exists and is not empty.
    """
    out = Path(out)
    check_absent(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if out.exists():
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
