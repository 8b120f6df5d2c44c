"""The two files of a PEFT adapter, read and checked before anything is made of them.

The invariant: a value of the wrong type, a damaged file or a number that is none becomes one
ValueError that names the file and the key or tensor.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

SAFETENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"


def other_model(folder: Path, found: str, wanted: str) -> ValueError:
    """The error that refuses an adapter of another model."""
    return ValueError(
        f"the adapter {folder} was made for another model: it has {found}, this model needs "
        f"{wanted}"
    )


def short(value) -> str:
    """A value of a file for a message of one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_json(file: Path) -> dict[str, Any]:
    """The settings in a file; a ValueError where it holds none."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); save the adapter again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file} holds no settings; save the adapter again")
    return tree


def read_adapter_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter, float32; safetensors come before a pickle, as in PEFT.

    Raises:
        ValueError: there are none, they are damaged, or one is not made of finite numbers.
    """
    pickle = folder / PICKLE
    if pickle.is_file() and not (folder / SAFETENSORS).exists():
        return _numbers(pickle, _load_pickle(pickle))
    return read_tensors(folder / SAFETENSORS)


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, float32; errors as of `read_adapter_tensors`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is missing or damaged ({error}); save the adapter again"
        ) from error
    except (AttributeError, TypeError) as error:  # a type that numpy does not have
        raise ValueError(
            f"{file} holds numbers of a type that is not read here ({error}); save the adapter as "
            "float32"
        ) from error
    return _numbers(file, tensors)


def _load_pickle(file: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"{file} is a PyTorch pickle; install torch to read it, or save the adapter again as "
            "safetensors"
        ) from error
    try:
        tree = torch.load(file, map_location="cpu", weights_only=True)
        plain = lambda x: x.float() if x.is_floating_point() else x  # numpy has no bfloat16
        return {str(name): plain(tensor.detach()).numpy() for name, tensor in tree.items()}
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"{file} is damaged or holds more than tensors ({reason}); save the adapter again"
        ) from error


def _numbers(file: Path, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors in float32, all of them finite."""
    for name, value in tensors.items():
        if value.dtype.kind not in "fV":  # V: numpy's kind of bfloat16
            raise ValueError(
                f"{name} in {file} holds {value.dtype} and no floating-point numbers; save the "
                "adapter again"
            )
        tensors[name] = value = value.astype(np.float32)
        bad = value.size - int(np.isfinite(value).sum())
        if bad:
            raise ValueError(
                f"{name} in {file} has {bad} numbers of {value.size} that are not finite; the "
                "training has diverged, take an earlier adapter"
            )
    return tensors
