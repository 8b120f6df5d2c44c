"""compressed-tensors checkpoints: `pack-quantized` and the sparse bitmasks, one matrix at a time.

`pack-quantized`, per linear [out, in]: `weight_packed` int32 [out, ceil(in * bits / 32)], a stream
along the inputs; `weight_scale` [out, groups]; `weight_zero_point` int32 [ceil(out * bits / 32),
groups], a stream along the outputs, absent where every zero is 2^(bits - 1); `weight_g_idx` [in]
where inputs name their group, -1 throughout where they do not; `weight_shape` [2]. What is stored
is q + 2^(bits - 1) of signed q, for the zeros as well, which is our unsigned code. Before version
0.18 a word of 3 bits held 10 values and two idle bits; the width of `weight_packed` tells. The
oldest files keep each signed zero by itself, int8 [out, groups]; the shape tells.

`sparse-bitmask`: `compressed` [values that are not 0], `bitmask` uint8 [out, ceil(in / 8)] from the
lowest bit on, `row_offsets` int64 [out], `shape` int64 [2]. `sparse-24-bitmask`: `compressed`
[out, in / 2], `bitmask`, `shape` [2, 1]; every run of 4 keeps 2, zeros among them if need be.

The invariant: dequantised values are those that the library computes from float32 scales.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from idp_jax.formats.gptq import as_scales, check_parts, group_index, groups_of
from idp_jax.formats.quantization import BITMASK_24, Packing
from idp_jax.kernels.packing import pack, unpack, word_count
from idp_jax.weights import Dense, Quantized

REQUIRED = ("weight_packed", "weight_scale")
OPTIONAL = ("weight_zero_point", "weight_g_idx", "weight_shape")
LARGE = ("weight_packed",)  # what is read when the weight is placed
MASKED = ("compressed", "bitmask", "shape")


def to_weight(
    name: str,
    shape: tuple[int, int],
    parts: Mapping[str, Any],
    bias: np.ndarray | None,
    packing: Packing,
) -> Quantized:
    """One packed linear as a weight.

    Args:
        name: of the module, for errors.
        shape: (out, in).
        parts: the tensors of `REQUIRED`, and of `OPTIONAL` those that are there; those of `LARGE`
            may be read later, and then so are the weight's words.

    Raises:
        ValueError: shapes or types that do not fit together, or scales that are not finite.
    """
    outputs, inputs = shape
    bits, words = packing.bits, parts["weight_packed"]
    if inputs * bits % 32:
        raise ValueError(
            f"the {inputs} inputs of {name} do not fill whole words of {bits} bits; only sizes "
            "that are multiples of 32 can be loaded"
        )
    if "weight_shape" in parts and tuple(parts["weight_shape"].ravel()) != shape:
        raise ValueError(
            f"{name}.weight_shape says {parts['weight_shape'].tolist()}, config.json asks for "
            f"{shape}; fetch the checkpoint again"
        )
    scales = _scales(f"{name}.weight_scale", parts["weight_scale"], outputs)
    groups = scales.shape[1]
    padded = words.shape == (outputs, _padded_words(inputs)) and bits == 3
    count = _padded_words if padded else lambda size: word_count(size, bits)
    zeros, expected = parts.get("weight_zero_point"), {"weight_packed": (outputs, count(inputs))}
    single = zeros is not None and zeros.size == outputs * groups
    if not single:
        expected["weight_zero_point"] = (count(outputs), groups)
    check_parts(name, parts, expected, bits)
    index = parts.get("weight_g_idx")
    if index is not None and np.all(index == -1):
        index = None
    return Quantized(
        np.asarray(pack(jnp.asarray(_padded_values(words[...].T, inputs)), 3))
        if padded
        else words.T,
        np.ascontiguousarray(scales.T),
        _single_zeros(f"{name}.weight_zero_point", zeros, (outputs, groups), bits)
        if zeros is not None and single
        else _zeros(zeros, outputs, groups, bits, padded),
        bits=bits,
        group_index=groups_of(f"{name}.weight_g_idx", inputs, groups, index, packing.group_size),
        bias=bias,
    )


def _scales(name: str, stored: np.ndarray, outputs: int) -> np.ndarray:
    """[O, G], float16 or float32; float16 also where float32 fits it, as what is written here."""
    if stored.ndim not in (1, 2) or len(stored) != outputs:
        raise ValueError(f"{name} has shape {stored.shape}; config.json asks for {outputs} rows")
    scales = as_scales(name, stored).reshape(outputs, -1)
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    exact = stored.dtype == np.float32 and np.array_equal(halves, scales)
    return halves if exact else scales


def _zeros(
    words: np.ndarray | None, outputs: int, groups: int, bits: int, padded: bool
) -> np.ndarray:
    """uint8 [G, O]."""
    if words is None:
        return np.full((groups, outputs), 2 ** (bits - 1), np.uint8)
    if padded:
        return np.ascontiguousarray(_padded_values(words, outputs).T)
    values = unpack(jnp.asarray(words), bits, count=outputs)
    return np.ascontiguousarray(np.asarray(values).T)


def _single_zeros(name: str, stored: np.ndarray, shape: tuple[int, int], bits: int) -> np.ndarray:
    """uint8 [G, O] of signed numbers [O, G] that are not packed."""
    fits = stored.shape == shape or stored.shape == shape[:1]
    codes = stored.reshape(shape).astype(np.int64) + 2 ** (bits - 1)
    if not fits or stored.dtype.kind != "i" or codes.min() < 0 or codes.max() >= 2**bits:
        raise ValueError(
            f"{name} is {stored.dtype} {stored.shape}; zero points of {bits} bits are words of "
            f"int32, or signed numbers {shape} of that many bits"
        )
    return np.ascontiguousarray(codes.T.astype(np.uint8))


def _padded_words(count: int) -> int:
    return -(-count // 10)


def _padded_values(words: np.ndarray, count: int) -> np.ndarray:
    """3-bit values [count, N] of words [M, N] that hold 10 each."""
    shifts = np.arange(0, 30, 3, dtype=np.uint32)[:, None]
    values = (np.ascontiguousarray(words).view(np.uint32)[:, None] >> shifts) & np.uint32(7)
    return values.astype(np.uint8).reshape(-1, words.shape[1])[:count]


def is_symmetric(weight: Quantized) -> bool:
    """Whether every zero is 2^(bits - 1), which is not stored then."""
    return bool((np.asarray(weight.zeros[...]) == 2 ** (weight.bits - 1)).all())


def from_weight(weight: Quantized) -> dict[str, np.ndarray]:
    """The tensors of one packed linear.

    Scales are float32 in the file: the library multiplies in their dtype, and would round every
    weight to float16.
    """
    words = np.asarray(weight.words[...])
    scales = np.asarray(weight.scales[...]).astype(np.float32)
    inputs, outputs = weight.inputs, weight.outputs
    tensors = {
        "weight_packed": words.T,
        "weight_scale": scales.T,
        "weight_shape": np.array([outputs, inputs], np.int64),
    }
    if not is_symmetric(weight):
        zeros = jnp.asarray(np.asarray(weight.zeros[...]).T)
        tensors["weight_zero_point"] = np.asarray(pack(zeros, weight.bits))
    if weight.group_index is not None:
        tensors["weight_g_idx"] = group_index(weight)
    return tensors


def from_mask(name: str, parts: dict[str, np.ndarray]) -> np.ndarray:
    """The dense tensor of `sparse-bitmask` or `sparse-24-bitmask` parts.

    Raises:
        ValueError: a mask that does not fit the shape or the number of values.
    """
    shape = tuple(int(size) for size in parts["shape"].ravel())
    bits = np.unpackbits(parts["bitmask"], axis=-1, bitorder="little").astype(bool)
    mask = bits[..., : shape[-1]]
    values = parts["compressed"].ravel()
    if mask.shape != shape or int(mask.sum()) != values.size:
        raise ValueError(
            f"{name}.bitmask of shape {parts['bitmask'].shape} does not fit a tensor of shape "
            f"{shape} with {values.size} values; fetch it again"
        )
    dense = np.zeros(shape, values.dtype)
    dense[mask] = values
    return dense


def to_mask(name: str, weight: Dense, form: str) -> dict[str, np.ndarray]:
    """The tensors of one sparse linear.

    Raises:
        ValueError: `sparse-24-bitmask` of a matrix in which a run of 4 inputs has fewer than two
            zeros.
    """
    matrix = np.ascontiguousarray(np.asarray(weight.kernel[...]).T)
    mask = matrix != 0
    if form == BITMASK_24:
        mask = _kept_two_of_four(name, mask)
    values = matrix[mask]
    tensors = {
        "shape": np.array(matrix.shape, np.int64),
        "compressed": values,
        "bitmask": np.packbits(mask, axis=-1, bitorder="little"),
    }
    if form == BITMASK_24:
        tensors["shape"] = tensors["shape"].reshape(-1, 1)
        tensors["compressed"] = values.reshape(len(matrix), -1)
    else:
        counts = mask.sum(1)
        tensors["row_offsets"] = np.cumsum(counts, dtype=np.int64) - counts
    return tensors


def _kept_two_of_four(name: str, mask: np.ndarray) -> np.ndarray:
    """The mask with exactly two of every four, the first zeros filling up where there are fewer."""
    if mask.shape[1] % 4 or int(mask.reshape(-1, 4).sum(1).max()) > 2:
        raise ValueError(
            f"{name} is not 2:4 sparse, which sparse-24-bitmask needs; prune it with --sparsity "
            "2:4, or convert to sparse-bitmask"
        )
    runs = mask.reshape(-1, 4)
    # A stable sort brings what is not zero to the front of each run, and zeros in order behind it.
    kept = np.argsort(~runs, axis=1, kind="stable")[:, :2]
    filled = np.zeros_like(runs)
    np.put_along_axis(filled, kept, True, axis=1)
    return filled.reshape(mask.shape)
