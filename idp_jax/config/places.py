"""Where results may go: never onto, into or around what a command reads."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from idp_jax.config.groups import ConfigError


def check_apart(out: str | Path | None, sources: dict[str, Any]) -> None:
    """Refuses a place that is, lies in or holds one of the sources.

    Args:
        out: what is to be written.
        sources: by name, what is read: a file, a folder, a name on the hub, or None.

    Raises:
        ConfigError: it names the source.
    """
    for name, source in sources.items():
        if out is None or source in (None, "", "self") or str(source).startswith("hub:"):
            continue
        for place in _places(Path(os.path.expanduser(source))):
            relation = _relation(Path(out), place)
            if relation:
                raise ConfigError(f"--out {out} {relation} the {name} {source}; give another --out")


def check_not_working(out: str | Path | None) -> None:
    """Refuses the current folder, a home folder and what holds them: a result never replaces those.

    Raises:
        ConfigError: it is one of them.
    """
    for place in (Path.cwd(), Path(os.path.expanduser("~"))):
        holders = (place, *place.parents)
        if out is not None and any(_same(Path(out), folder) for folder in holders):
            raise ConfigError(f"--out {out} is or holds the folder {place}; give a new folder")


def _places(source: Path) -> Iterator[Path]:
    """A source, and where its files lie if they are links."""
    yield source
    if source.is_dir():
        yield from (entry.resolve() for entry in source.iterdir() if entry.is_symlink())


def _relation(out: Path, source: Path) -> str | None:
    if _same(out, source):
        return "is"
    if not source.exists():  # a name on the hub
        return None
    resolved = source.resolve()
    if any(_same(out, folder) for folder in resolved.parents):
        return "holds"
    inside = source.is_dir() and any(_same(folder, source) for folder in out.resolve().parents)
    return "lies in" if inside else None


def _same(first: Path, second: Path) -> bool:
    """Whether two paths are one place, by whatever name and however mounted."""
    if first.resolve() == second.resolve():
        return True
    return first.exists() and second.exists() and os.path.samefile(first, second)
