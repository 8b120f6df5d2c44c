"""GPTQ checkpoints (AutoGPTQ / GPTQModel): packed words and their settings.

Per linear: `qweight` int32 [in * bits / 32, out], `qzeros` int32 [groups, out * bits / 32],
`scales` float16 [groups, out], `g_idx` int32
[in]. Format `gptq` (v1) stores every zero minus one, modulo 2^bits, field by field; `gptq_v2`
stores the zero itself.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from idp_jax.kernels.quant_matmul.packing import pack, unpack
from idp_jax.weights import Quantized

BITS = (2, 3, 4, 8)
FORMATS = VERSION_1, VERSION_2 = ("gptq", "gptq_v2")


@dataclass(frozen=True)
class Settings:
    """What is needed to read the words: bits, inputs of a group (-1: all), which of `FORMATS`."""

    bits: int
    group_size: int
    checkpoint_format: str


def read_settings(config: dict[str, Any] | None) -> Settings | None:
    """Reads `quantize_config.json` or config.json's `quantization_config`.

    Raises:
        ValueError: another method, bit width or checkpoint format than is supported.
    """
    if config is None:
        return None
    method = config.get("quant_method", "gptq")
    if method != "gptq":
        raise ValueError(f"quant_method {method!r} is not supported; supported: gptq")
    bits, form = config.get("bits"), config.get("checkpoint_format", VERSION_1)
    if bits not in BITS:
        raise ValueError(
            f"{bits}-bit GPTQ is not supported; supported: {', '.join(map(str, BITS))}"
        )
    if form not in FORMATS:
        raise ValueError(
            f"checkpoint_format {form!r} is not supported; supported: {', '.join(FORMATS)}"
        )
    if config.get("pack_dtype", "int32") != "int32":
        raise ValueError(f"pack_dtype {config['pack_dtype']!r} is not supported; supported: int32")
    if config.get("dynamic"):
        raise ValueError("per-module settings ('dynamic') are not supported")
    if config.get("lm_head"):
        raise ValueError("a packed lm_head is not supported; quantise again with lm_head false")
    return Settings(bits, config.get("group_size", -1), form)


def write_settings(
    bits: int, group_size: int, symmetric: bool, damping: float | None
) -> dict[str, Any]:
    """The `quantization_config` of a folder written here."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": VERSION_2,
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": damping,
        "lm_head": False,
        "pack_dtype": "int32",
    }


def to_weight(
    name: str,
    shape: tuple[int, int],
    parts: dict[str, np.ndarray],
    group_index: np.ndarray | None,
    bias: np.ndarray | None,
    settings: Settings | None,
) -> Quantized:
    """One packed linear as a weight; the words stay as they are on disk.

    Args:
        shape: (out, in).
        parts: qweight, qzeros and scales.

    Raises:
        ValueError: shapes that do not fit together, or packed tensors without settings.
    """
    if settings is None:
        raise ValueError(f"{name} is packed, but config.json has no quantization_config")
    outputs, inputs = shape
    groups = parts["scales"].shape[0]
    expected = {
        "qweight": (inputs * settings.bits // 32, outputs),
        "qzeros": (groups, outputs * settings.bits // 32),
        "scales": (groups, outputs),
    }
    for key, wanted in expected.items():
        if parts[key].shape != wanted:
            raise ValueError(
                f"{name}.{key} has shape {parts[key].shape}; {settings.bits} bits and config.json "
                f"ask for {wanted}"
            )
    zeros = np.asarray(unpack(jnp.asarray(parts["qzeros"]), settings.bits, axis=-1), np.uint8)
    if settings.checkpoint_format != VERSION_2:
        zeros = (zeros + np.uint8(1)) & np.uint8(2**settings.bits - 1)
    scales = parts["scales"]
    return Quantized(
        parts["qweight"],
        # Scales keep the file's own float16 whatever the model's dtype: bfloat16 would round them.
        scales if scales.dtype == np.float16 else scales.astype(np.float32),
        zeros,
        bits=settings.bits,
        group_index=_groups_of(name, inputs, groups, group_index, settings),
        bias=bias,
    )


def _groups_of(
    name: str, inputs: int, groups: int, index: np.ndarray | None, settings: Settings
) -> np.ndarray | None:
    """The group of every input, or None where groups are runs of I // G inputs."""
    if index is None:
        size = settings.group_size if settings.group_size > 0 else inputs
        index = np.arange(inputs) // size
    if index.shape != (inputs,) or index.min() < 0 or index.max() >= groups:
        raise ValueError(
            f"{name}.g_idx must give each of {inputs} inputs one of {groups} groups; "
            f"check group_size {settings.group_size} in the quantization settings"
        )
    plain = inputs % groups == 0 and np.array_equal(index, np.arange(inputs) // (inputs // groups))
    return None if plain else index.astype(np.int32)


def from_weight(weight: Quantized, checkpoint_format: str = VERSION_2) -> dict[str, np.ndarray]:
    """The tensors of one packed linear, `qweight qzeros scales g_idx`."""
    zeros = np.asarray(weight.zeros[...])
    inputs = weight.words.shape[0] * 32 // weight.bits
    if checkpoint_format != VERSION_2:
        zeros = (zeros - np.uint8(1)) & np.uint8(2**weight.bits - 1)
    if weight.group_index is None:
        group_index = np.arange(inputs, dtype=np.int32) // (inputs // zeros.shape[0])
    else:
        group_index = np.asarray(weight.group_index[...])
    return {
        "qweight": np.asarray(weight.words[...]),
        "qzeros": np.asarray(pack(jnp.asarray(zeros), weight.bits, axis=-1)),
        "scales": np.asarray(weight.scales[...]).astype(np.float16),
        "g_idx": group_index.astype(np.int32),
    }
