"""Sources and runs on object stores: any URL that fsspec knows, kept beside as local files.

A source is copied to a folder of the user's cache, file by file, and again where it has changed. A
run works in such a folder, and what it has written goes to its URL once a minute and at its end.
The invariant: what the URL's list (`MANIFEST`) names was complete when the list was written, so any
machine goes on from there; and of two jobs that write to one URL the second to notice stops.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from idp_jax.config import ConfigError, url_of
from idp_jax.jobs.files import write_json
from idp_jax.jobs.launch import launched_together
from idp_jax.jobs.lock import locked

_log = logging.getLogger(__name__)
MANIFEST = ".idp-jax-files.json"
EVERY = 60.0  # seconds between two copies of a run to its URL
# Of a run's folder, what is not written whole, or is of this machine alone.
_SKIPPED = re.compile(r"(^|/)\.lock$|\.partial|\.replaced(/|$)|orbax-checkpoint-tmp")
_LAST = "result.json"  # it says of the others that they are there


def local(source: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """The file or folder itself, or of a URL a copy of it in the cache.

    Args:
        wanted: of a folder's files, by their place in it, those that are copied.

    Raises:
        ConfigError: nothing is there, or it cannot be read.
    """
    url = url_of(source)
    return Path(source).expanduser() if url is None else _copied(url, wanted)


@cache  # once a process: what it reads twice is the same
def _copied(url: str, wanted: Callable[[str], bool]) -> Path:
    with _reading(url):
        system, path = _opened(url)
        single = system.isfile(path)
        found = [path] if single else [*system.find(path)]
        start = path.rstrip("/").rpartition("/")[0] if single else path.rstrip("/")
        names = {file.removeprefix(start).lstrip("/"): file for file in found}
        asked = {name: file for name, file in names.items() if single or wanted(name)}
        if not asked:
            raise FileNotFoundError("nothing is there")
        folder = _place(url)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of the processes of a machine one copies
            _update(system, asked, set(names), folder)
    return folder / next(iter(names)) if single else folder


def _update(system: Any, asked: dict[str, str], there: set[str], folder: Path) -> None:
    """Copies the files that are not here yet, or are others by now, and removes what is gone."""
    kept = folder / ".kept.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in [name for name in known if name not in there]:
        (folder / name).unlink(missing_ok=True)
        known.pop(name)
    for name, file in asked.items():
        key = str(system.ukey(file))
        if known.get(name) == key and (folder / name).is_file():
            continue
        _fetch(system, file, folder / name)
        known[name] = key
        write_json(kept, known)


def _fetch(system: Any, file: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    system.get_file(file, str(partial))
    partial.replace(target)


@contextmanager
def working(out: str | Path) -> Iterator[Path]:
    """The folder that a run works in: its own, or for a URL a local one that is copied there.

    Raises:
        ConfigError: something else is at the URL, it cannot be reached, or another job writes it.
    """
    url = url_of(out)
    if url is None:
        yield Path(out)
        return
    folder = _place(url)
    with locked(folder.with_name(f"{folder.name}.copying")):
        with _reading(url):
            mirror = _Mirror(url, folder)
            mirror.pull()
        stop = threading.Event()
        copier = threading.Thread(target=mirror.follow, args=(stop,), daemon=True)
        copier.start()
        try:
            yield folder
        finally:
            stop.set()
            copier.join()
            with _reading(url):
                mirror.push()


@contextmanager
def brought(settings: Any) -> Iterator[Any]:
    """A command's settings, with a local place for what it is to write to a URL.

    What is there when the block ends is copied to the URL; of a folder also meanwhile.

    Raises:
        ConfigError: as of `working`, or the command is to run in several processes.
    """
    url = None if settings.writes is None else url_of(settings.out)
    if url is None:
        yield settings
        return
    mesh = getattr(settings, "mesh", None)
    if launched_together() or (mesh is not None and mesh.distributed):
        raise ConfigError(
            f"--out {url} is a URL, and several processes write into one place; mount the bucket "
            "(gcsfuse, s3fs) and give its place there"
        )
    place = working if settings.writes == "folder" else _written
    with place(url) as here:
        try:
            yield replace(settings, out=here)
        except ValueError as error:
            if str(here) not in str(error):
                raise
            raise ConfigError(str(error).replace(str(here), url)) from error


@contextmanager
def _written(url: str) -> Iterator[Path]:
    """A local file with the contents of a URL, which is copied there where it was written anew."""
    file = _place(url)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _reading(url):
        system, path = _opened(url)
        if system.exists(path):
            _fetch(system, path, file)
        else:
            file.unlink(missing_ok=True)
    before = _stamp(file)
    yield file
    if _stamp(file) != before:
        with _reading(url):
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            system.put_file(str(file), path)


def _stamp(file: Path) -> tuple[int, int] | None:
    """What tells whether a file was written again."""
    state = file.stat() if file.exists() else None
    return None if state is None else (state.st_ino, state.st_mtime_ns)


class _Mirror:
    """A local folder and its copy at a URL."""

    def __init__(self, url: str, folder: Path):
        self.url, self.folder = url, folder
        self.system, self.path = _opened(url)
        self.path = self.path.rstrip("/")
        self._kept = folder.with_name(
            f"{folder.name}.json"
        )  # the last copy that was made from here
        self._sent: dict[str, tuple[int, int]] = {}

    def pull(self) -> None:
        """Brings the local folder to what is at the URL, unless that came from this folder."""
        listed = self._listed()
        kept = json.loads(self._kept.read_text()) if self._kept.is_file() else {}
        if listed is None:
            if self.system.exists(self.path) and self.system.find(self.path):
                raise ConfigError(
                    f"{self.url} exists and holds no run of this kind; give another --out"
                )
            if kept:  # it was there, and has been removed; else only this folder has the work
                shutil.rmtree(self.folder, ignore_errors=True)
                self._kept.unlink()
            self._token = None
            return
        self._token = listed["token"]
        if kept.get("token") == self._token and self.folder.is_dir():
            self._sent = {name: tuple(stamp) for name, stamp in kept["sent"].items()}
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in listed["files"]:
            _fetch(self.system, f"{self.path}/{name}", self.folder / name)
        self._sent = self._stamps()

    def push(self) -> None:
        """Copies what is new or has changed, then the list, and then removes what is gone.

        Raises:
            ConfigError: another job has written there.
            FileNotFoundError: a file was removed meanwhile; the next call copies what there is.
        """
        stamps = self._stamps()
        if stamps == self._sent or not stamps:
            return
        listed = self._listed()
        if (listed or {}).get("token") != self._token:
            raise ConfigError(f"{self.url} is being written by another job; give another --out")
        for name in sorted(stamps, key=lambda name: (name == _LAST, name)):
            if self._sent.get(name) != stamps[name]:
                place = f"{self.path}/{name}"
                self.system.makedirs(place.rpartition("/")[0], exist_ok=True)
                self.system.put_file(str(self.folder / name), place)
        token = uuid.uuid4().hex
        content = json.dumps({"writer": "idp-jax", "token": token, "files": sorted(stamps)})
        self.system.pipe_file(f"{self.path}/{MANIFEST}", content.encode())
        write_json(self._kept, {"token": token, "sent": stamps})
        self._sent, self._token = stamps, token
        for name in set((listed or {}).get("files", ())) - set(stamps):
            with suppress(FileNotFoundError):
                self.system.rm_file(f"{self.path}/{name}")

    def follow(self, stop: threading.Event) -> None:
        """Copies now and then until the event is set."""
        while not stop.wait(EVERY):
            try:
                with suppress(FileNotFoundError):  # an old checkpoint, say: the next time
                    self.push()
            except Exception as error:  # a network's: the last time tells
                _log.warning("%s was not written: %s", self.url, error)

    def _listed(self) -> dict[str, Any] | None:
        file = f"{self.path}/{MANIFEST}"
        self.system.invalidate_cache()
        return json.loads(self.system.cat_file(file)) if self.system.exists(file) else None

    def _stamps(self) -> dict[str, tuple[int, int]]:
        """Size and time of every file of the local folder that is copied."""
        found = {}
        for file in sorted(self.folder.rglob("*")):
            name = file.relative_to(self.folder).as_posix()
            if not _SKIPPED.search(name):
                with suppress(FileNotFoundError):  # it has just been removed
                    state = file.stat()
                    if file.is_file():
                        found[name] = (state.st_size, state.st_mtime_ns)
        return found


def _opened(url: str) -> tuple[Any, str]:
    import fsspec

    system, path = fsspec.url_to_fs(url)
    return system, path


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """Says of whatever a store's library raises which URL it was, and what to do."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of many libraries, each with errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{url} cannot be used ({reason:.300}); check the URL and the right to it, install its "
            "fsspec library, or mount the bucket and give its folder"
        ) from error


def _place(url: str) -> Path:
    """Where the copy of a URL lies."""
    cache = os.environ.get("IDP_JAX_CACHE") or "~/.cache/idp-jax"
    known = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    return Path(cache).expanduser() / known / (url.rstrip("/").rpartition("/")[2] or "root")
