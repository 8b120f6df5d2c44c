"""Finished folders know what was written into them: a small file there lists it.

So this software can tell what it may replace from what it must not touch, and a result that is as
it was left from one that was changed.
"""

import json
from pathlib import Path

from idp_jax.jobs.files import contents, digest, read_json, write_json

MARKER = ".idp-jax.json"


def mark(folder: Path) -> None:
    """Lists all that is in a folder, which is complete, and signs for it."""
    write_json(folder / MARKER, {"writer": "idp-jax", "files": _listed(contents(folder))})


def is_marked(folder: Path) -> bool:
    """Whether this software wrote the folder."""
    try:
        tree = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and isinstance(tree.get("files"), dict)


def foreign(folder: Path) -> str | None:
    """The first file in a marked folder that was added to it, or changed, since it was written."""
    found = _listed(contents(folder))
    known = _files(folder)
    return next((name for name, value in found.items() if known.get(name) != value), None)


def changed(folder: Path) -> str | None:
    """The first file of a marked folder that is missing or was changed since."""
    return next(
        (
            name
            for name, found in _files(folder).items()
            if not (folder / name).is_file() or digest(folder / name) != found
        ),
        None,
    )


def _files(folder: Path) -> dict[str, str]:
    return read_json(folder / MARKER, "remove the folder, and give its command again")["files"]


def _listed(found: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in found.items() if name != MARKER}
