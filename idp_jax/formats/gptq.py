"""GPTQ checkpoints (AutoGPTQ / GPTQModel): the tensors of one packed matrix.

Per linear: `qweight` int32 [in * bits / 32, out], `qzeros` int32 [groups, out * bits / 32],
`scales` float16 [groups, out], `g_idx` int32 [in]. Form `gptq` (v1) stores every zero minus one,
modulo 2^bits, field by field; `gptq_v2` stores the zero itself. GPTQModel's v1 files of 2, 4 and 8
bits differ where a zero is 0: it subtracts from whole words. The invariant: the words of the
inputs are those of `weights.Quantized`, so they are taken over as they are.
"""

import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from idp_jax.formats.later import Later
from idp_jax.formats.quantization import PLANAR, Layout, Packing
from idp_jax.kernels.packing import pack, unpack
from idp_jax.weights import Quantized

_log = logging.getLogger(__name__)
REQUIRED, OPTIONAL = ("qweight", "qzeros", "scales"), ("g_idx",)
LARGE = REQUIRED  # what is read when the weight is placed


def to_weight(
    name: str,
    shape: tuple[int, int],
    parts: Mapping[str, np.ndarray | Later],
    bias: np.ndarray | None,
    packing: Packing,
    layout: Layout,
) -> Quantized:
    """One packed linear as a weight.

    Args:
        name: of the module, for errors.
        shape: (out, in).
        parts: qweight, qzeros, scales and, where it is there, g_idx; those of `LARGE` may be read
            later, and then so is the weight's own.
        layout: the checkpoint's, for its form.

    Raises:
        ValueError: shapes or types that do not fit together, scales that are not finite, or an
            order of the inputs that is announced but not there.
    """
    outputs, inputs = shape
    bits, groups = packing.bits, (parts["scales"].shape or (1,))[0]
    expected = {
        "qweight": (inputs * bits // 32, outputs),
        "qzeros": (groups, outputs * bits // 32),
        "scales": (groups, outputs),
    }
    check_parts(name, parts, expected, bits)
    if packing.act_order and groups > 1 and "g_idx" not in parts:
        raise ValueError(
            f"{name}.g_idx is missing, which desc_act in the quantization settings asks for; fetch "
            "the checkpoint again"
        )
    words, packed_zeros = parts["qweight"], parts["qzeros"]
    if layout.form == PLANAR and bits == 3:
        words = _from_planes(words[...])
    make_zeros = lambda: _zeros(packed_zeros[...], bits, layout)
    is_later = isinstance(packed_zeros, Later)
    index = parts.get("g_idx")
    return Quantized(
        words,
        as_scales(f"{name}.scales", parts["scales"]),
        Later((groups, outputs), np.uint8, make_zeros) if is_later else make_zeros(),
        bits=bits,
        group_index=groups_of(
            f"{name}.g_idx",
            inputs,
            groups,
            None if index is None else index[...],
            packing.group_size,
        ),
        bias=bias,
    )


def _zeros(words: np.ndarray, bits: int, layout: Layout) -> np.ndarray:
    """The zeros [G, O] of `qzeros` [G, O * bits / 32]."""
    packed = words.T
    if layout.form == PLANAR and bits == 3:
        packed = _from_planes(packed)
    by_word = layout.zeros_by_word and bits != 3
    if by_word:
        packed = packed.view(np.uint32) + np.uint32(0xFFFFFFFF // (2**bits - 1))
    zeros = np.asarray(unpack(jnp.asarray(packed), bits)).T
    if layout.form == "gptq" and not by_word:
        zeros = (zeros + np.uint8(1)) & np.uint8(2**bits - 1)
    return np.ascontiguousarray(zeros)


def check_parts(
    name: str,
    parts: Mapping[str, np.ndarray | Later],
    expected: dict[str, tuple[int, ...]],
    bits: int,
) -> None:
    """Holds the tensors of a packed matrix against what its size asks for.

    Raises:
        ValueError: another shape, or words that are not int32.
    """
    for key, wanted in expected.items():
        if key not in parts:
            continue
        if parts[key].shape != wanted:
            raise ValueError(
                f"{name}.{key} has shape {parts[key].shape}; {bits} bits and config.json "
                f"ask for {wanted}"
            )
        if "scale" not in key and parts[key].dtype != np.int32:
            raise ValueError(
                f"{name}.{key} is {parts[key].dtype}, but packed words are int32; fetch the "
                "checkpoint again"
            )


def as_scales(name: str, scales: Any) -> Any:
    """Scales in the file's own float16, whatever the model's dtype; any other type as float32.

    Raises:
        ValueError: they are no floating-point numbers.
    """
    if not jnp.issubdtype(scales.dtype, jnp.floating):
        raise ValueError(f"{name} is {scales.dtype}, but scales are floating-point numbers")
    return scales if scales.dtype == np.float16 else scales.astype(np.float32)


def groups_of(
    name: str, inputs: int, groups: int, index: np.ndarray | None, group_size: int
) -> np.ndarray | None:
    """The group of every input, or None where groups are runs of I // G inputs.

    Args:
        index: as in the file, or None, where groups are runs of `group_size` inputs.

    Raises:
        ValueError: an index of another length, a group that does not exist, or groups that the
            size leaves over.
    """
    runs = np.arange(inputs) // (group_size if group_size > 0 else inputs)
    # What the settings leave over would mean that the file is cut finer than they say.
    fits = index is not None or runs[-1] + 1 == groups
    index = runs if index is None else index
    whole = index.shape == (inputs,) and index.dtype.kind in "iu"
    if not fits or not whole or index.min() < 0 or index.max() >= groups:
        raise ValueError(
            f"{name} must give each of {inputs} inputs one of {groups} groups; "
            f"check group_size {group_size} in the quantization settings"
        )
    plain = inputs % groups == 0 and np.array_equal(index, np.arange(inputs) // (inputs // groups))
    return None if plain else index.astype(np.int32)


def group_index(weight: Quantized) -> np.ndarray:
    """The group of every input, int32 [I], written out."""
    if weight.group_index is not None:
        return np.asarray(weight.group_index[...], np.int32)
    return np.arange(weight.inputs, dtype=np.int32) // np.int32(weight.inputs // weight.groups)


def from_weight(name: str, weight: Quantized, form: str) -> dict[str, np.ndarray]:
    """The tensors of one packed linear, `qweight qzeros scales g_idx`.

    Raises:
        ValueError: scales that float16 cannot hold, or sizes that are no multiples of 32.
    """
    zeros = np.asarray(weight.zeros[...])
    inputs, outputs = weight.inputs, weight.outputs
    if inputs % 32 or outputs % 32:
        raise ValueError(
            f"{name} of {inputs} x {outputs} cannot be stored: GPTQ files need multiples of 32; "
            "convert to pack-quantized"
        )
    scales = np.asarray(weight.scales[...])
    halves = scales.astype(np.float16)
    if not np.array_equal(halves.astype(np.float32), scales.astype(np.float32)):
        raise ValueError(
            f"the scales of {name} are no float16 numbers, which GPTQ files hold; convert to "
            "pack-quantized"
        )
    if form == "gptq":
        if not zeros.all():
            _warn_of_zeros()
        zeros = (zeros - np.uint8(1)) & np.uint8(2**weight.bits - 1)
    return {
        "qweight": np.asarray(weight.words[...]),
        "qzeros": np.asarray(pack(jnp.asarray(zeros), weight.bits, axis=-1)),
        "scales": halves,
        "g_idx": group_index(weight),
    }


@functools.cache
def _warn_of_zeros() -> None:
    _log.warning(
        "some zeros are 0, which several programs misread in GPTQ v1 files; gptq_v2 is read alike "
        "by all"
    )


def _from_planes(words: np.ndarray) -> np.ndarray:
    """The words [3 K, N] of `gptq_p` as those of the stream.

    Of 32 values, the first two words hold the two low bits, the third the high bit.
    """
    planes = np.ascontiguousarray(words).reshape(-1, 3, words.shape[1])
    low = np.asarray(unpack(jnp.asarray(planes[:, :2]), 2, axis=1))
    high = np.unpackbits(
        planes[:, 2, None, :].swapaxes(1, 2).copy().view(np.uint8), axis=-1, bitorder="little"
    ).swapaxes(1, 2)
    values = (low | high << np.uint8(2)).reshape(-1, words.shape[1])
    return np.asarray(pack(jnp.asarray(values), 3))
