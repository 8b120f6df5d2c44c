"""Which files of a folder hold the tensors of a model, and how one of them is read.

The choice is that of transformers: what config.json names, else model.safetensors, else the index
of its shards, else pytorch_model.bin, else its index; other files beside them are not read. The
invariant: a tensor has one place, inside the folder.
"""

import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

from idp_jax.formats.folder import CheckpointError, inside, read_json, reason

_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


T = TypeVar("T")
# What safetensors calls the types that numpy has; a tensor of another one is read whole.
_TYPES = {
    **{f"I{8 * size}": f"int{8 * size}" for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": f"uint{8 * size}" for size in (1, 2, 4, 8)},
    **{"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16", "BOOL": "bool"},
}


class Place(NamedTuple):
    """Where a safetensors file holds a tensor: from which byte on, and as what."""

    start: int
    shape: tuple[int, ...]
    dtype: np.dtype


class TensorFiles:
    """The tensors of some files, read by name; PyTorch pickles stay memory-mapped between calls.

    Attributes:
        names: of all tensors.
    """

    def __init__(self, files: list[Path]):
        """Lists the tensors; none is read.

        Raises:
            CheckpointError: a file is missing or damaged, or two hold the same tensor.
        """
        self._pickles: dict[Path, dict] = {}
        self._headers: dict[Path, dict[str, Place]] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        for file in files:
            if not os.path.isfile(file):
                raise CheckpointError(f"shard {file} is missing; fetch the checkpoint again")
            for name, stored in self._stored(file).items():
                if name in self._places:
                    raise CheckpointError(
                        f"{name} is both in {self._places[name][0]} and in {file}; remove one"
                    )
                self._places[name] = file, stored
        self.names = frozenset(self._places)

    def __call__(self, name: str) -> np.ndarray:
        """Reads one tensor.

        Raises:
            CheckpointError: it is damaged, or of a type that numpy does not have.
        """
        file, stored = self._places[name]

        def read() -> np.ndarray:
            if file.suffix == ".safetensors":
                return _read_safetensor(file, stored)
            return _as_numpy(self._pickle(file)[stored])

        return self._tried(name, read)

    def view(self, name: str) -> np.ndarray:
        """One tensor as a map of its file where it can be: only what is looked at is read.

        Raises:
            CheckpointError: as of a call.
        """
        file, stored = self._places[name]
        place = self._headers.get(file, {}).get(stored)
        if place is None or 0 in place.shape:
            return self(name)
        start, shape, dtype = place
        view = lambda: np.asarray(np.memmap(file, dtype, "r", offset=start, shape=shape or (1,)))
        return self._tried(name, lambda: view().reshape(shape))

    def kind(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of a tensor, without reading it.

        Raises:
            CheckpointError: as of a call.
        """
        file, stored = self._places[name]
        place = self._headers.get(file, {}).get(stored)
        if place is not None:
            return place.shape, place.dtype
        if file.suffix == ".safetensors":
            value = self(name)
            return value.shape, value.dtype
        tensor = self._pickle(file)[stored]
        # An empty piece of it has its dtype.
        first = self._tried(name, lambda: _as_numpy(tensor.reshape(-1)[:0]))
        return tuple(tensor.shape), first.dtype

    def _tried(self, name: str, read: Callable[[], T]) -> T:
        try:
            return read()
        except CheckpointError:
            raise
        except Exception as error:  # of many libraries, each with errors of its own
            raise CheckpointError(
                f"{name!r:.200} in {self._places[name][0]} cannot be read ({reason(error)}); write "
                "it as a plain tensor, best in a .safetensors file"
            ) from error

    def _stored(self, file: Path) -> dict[str, str]:
        """Tensor name -> the name under which the file holds it."""
        if file.suffix != ".safetensors":
            return {name: name for name in self._pickle(file)}
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "np") as handle:
                names, aliases = set(handle.keys()), handle.metadata() or {}
            self._headers[file] = _places(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"shard {file} is damaged or cut short ({reason(error)}); fetch it again"
            ) from error
        # safetensors' save_model keeps one name of a shared tensor and notes the others.
        others = {alias: kept for alias, kept in aliases.items() if kept in names}
        return others | {name: name for name in names}

    def _pickle(self, file: Path) -> dict:
        if file not in self._pickles:
            self._pickles[file] = _load_pickle(file)
        return self._pickles[file]


def model_files(folder: Path, named: Any = None) -> TensorFiles:
    """The tensors of the model that a folder holds.

    Args:
        named: what config.json calls `transformers_weights`, or None.

    Raises:
        CheckpointError: there are none, they are ambiguous or outside, or a file is damaged.
    """
    if named is None:
        chosen = next((folder / name for name in _NAMES if os.path.isfile(folder / name)), None)
    else:
        chosen = inside(folder, named, folder / "config.json")
        if not str(named).endswith((".safetensors", ".safetensors.index.json")):
            raise CheckpointError(
                f"{folder / 'config.json'} names {named!r} as transformers_weights, which is "
                "neither a .safetensors file nor the index of some; correct it"
            )
    if chosen is None:
        return TensorFiles(_unnamed(folder))
    if chosen.suffix != ".json":
        return TensorFiles([chosen])
    listed = _weight_map(chosen)
    files = TensorFiles(sorted({inside(folder, file, chosen) for file in listed.values()}))
    lacking = sorted(set(listed) - files.names)
    if lacking:
        name = lacking[0]
        raise CheckpointError(f"{folder / listed[name]} lacks {name!r:.200}; fetch it again")
    return files


def _weight_map(index: Path) -> dict[str, Any]:
    """Tensor name -> file name, from the index of a sharded checkpoint."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map; fetch it again")
    if not all(isinstance(file, str) for file in places.values()):
        name = next(name for name, file in places.items() if not isinstance(file, str))
        raise CheckpointError(f"{index} gives no file name for {name!r:.100}; fetch it again")
    return places


def _unnamed(folder: Path) -> list[Path]:
    """The safetensors files of a folder where none has a known name: one file, or one set."""
    files = sorted(folder.glob("*.safetensors"))
    shards = [re.fullmatch(r"(.*)-\d+-of-(\d+)", file.stem) for file in files]
    sets = {(shard[1], int(shard[2])) if shard else None for shard in shards}
    if len(files) == 1 or (len(sets) == 1 and all(s and s[1] == len(files) for s in sets)):
        return files
    shards = sorted(folder.glob("pytorch_model-*-of-*.bin"))
    if not files and shards:
        raise CheckpointError(
            f"{folder} holds {shards[0].name}, and no pytorch_model.bin.index.json that says which "
            "tensors lie where; fetch that too"
        )
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors and no pytorch_model*.bin file")
    raise CheckpointError(
        f"{folder} holds {files[0].name} and {files[1].name}, and no index says which make the "
        "model; call the right one model.safetensors"
    )


def _places(file: Path) -> dict[str, Place]:
    """Where a file that safetensors takes holds its tensors, but for types that numpy lacks."""
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
    return {
        name: Place(
            8 + size + entry["data_offsets"][0],
            tuple(entry["shape"]),
            jnp.dtype(_TYPES[entry["dtype"]]),
        )
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in _TYPES
    }


def _read_safetensor(file: Path, name: str) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(file, "np") as handle:
        return handle.get_tensor(name)


def _load_pickle(file: Path) -> dict:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CheckpointError(
            f"{file} is a PyTorch pickle; install torch to read it, or convert it to safetensors"
        ) from error
    # Files that torch wrote before version 1.6 are no zip archives and cannot be memory-mapped.
    mapped = zipfile.is_zipfile(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped or None)
    except Exception as error:
        raise CheckpointError(
            f"shard {file} is damaged, cut short, or holds more than tensors "
            f"({reason(error)}); fetch it again, or convert it to safetensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{file} holds no tensors by name; save the model's state_dict")
    return content


def _as_numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    # numpy has no bfloat16 of torch's kind; float32 holds every bfloat16 exactly.
    halves = tensor.is_floating_point() and tensor.dtype.itemsize == 2
    return (tensor.float() if halves else tensor).numpy()
