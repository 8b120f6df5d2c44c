"""Where compiled programs are kept between two calls of a command.

A run that goes on does not compile again, and runs the very program that it ran before.
"""

import hashlib
import os
import platform
from pathlib import Path

FOLDER = "JAX_COMPILATION_CACHE_DIR"
"""JAX's own variable, which wins; "" keeps nothing."""


def keep_programs() -> None:
    """Has JAX keep what took more than a second to compile; to be called before it is imported.

    Nothing is kept where the folder cannot be made: programs are compiled again there.
    """
    if FOLDER in os.environ:
        return
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "idp-jax" / _processor()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home
        return
    if os.access(folder, os.W_OK):
        os.environ[FOLDER] = str(folder)


def _processor() -> str:
    """A name of this processor's abilities: JAX calls all of them "cpu", and a home is shared."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    abilities = [line for line in lines if line.lower().startswith(("flags", "features"))][:1]
    known = "".join(abilities) or platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
