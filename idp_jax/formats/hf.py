"""How a model is put together from Hugging Face's tensors, and taken apart into them again.

`names.py` gives the name of every parameter; linear weights are [out, in] on disk and [in, out] in
the modules. The tensors beside a module's name tell how it is stored (`gptq.py`,
`compressed_tensors.py`). The invariant: what one reads, the other writes under the same names.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from idp_jax.config.choices import FloatType
from idp_jax.formats import compressed_tensors, gptq
from idp_jax.formats.folder import CheckpointError
from idp_jax.formats.later import Later, place, whole
from idp_jax.formats.quantization import (
    DENSE,
    PACK_QUANTIZED,
    SPARSE_FORMS,
    Layout,
    Packing,
    read_config,
)
from idp_jax.formats.source import Source
from idp_jax.formats.stack import expanded, stacked
from idp_jax.models.abstract import abstract
from idp_jax.models.block import Block, layer_slice
from idp_jax.models.config import ModelConfig, from_hf
from idp_jax.models.decoder import Decoder
from idp_jax.models.layers import Norm
from idp_jax.models.matrices import matrices
from idp_jax.models.names import NAMES
from idp_jax.weights import Dense, Quantized

_DTYPES = get_args(FloatType)
_STORED = (*_DTYPES, "float64")
_UNUSED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


def _float_dtype(name) -> np.dtype:
    if str(name) not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; supported: auto, {', '.join(_DTYPES)}")
    return jnp.dtype(name)


class Reader:
    """Reads the parameters of one checkpoint, converts them, and remembers which it used.

    Nothing is read before it is asked for, and nothing is kept: one layer at a time is enough.

    Args:
        source: the opened checkpoint.
        dtype: of embeddings, norms and dense matrices; "auto" keeps the file's own.

    Attributes:
        config: the model's configuration.
        names: the tensor names of its architecture.
        layout: what the checkpoint says of its packed matrices, or None.

    Raises:
        ValueError: the configuration asks for something unsupported.
    """

    def __init__(self, source: Source, dtype="float32"):
        self.source = source
        self.config: ModelConfig = from_hf(source.hf_config)
        if (ends := source.stop_ids) is not None:
            self.config = replace(self.config, eos_token_ids=ends)
        self.names = NAMES[self.config.architecture]
        self.dtype = None if dtype == "auto" else _float_dtype(dtype)
        self.layout = read_config(source.quantization)
        self._expected = abstract(self.config)
        self._used: set[str] = set()

    def later(self, name: str, shape: tuple[int, ...] | None = None, *, cast: bool = True) -> Later:
        """One tensor, expanded where only a mask and its values are stored, to be read later.

        Args:
            cast: whether it is a parameter; else a part of a packed matrix, in its own type.

        Raises:
            CheckpointError: it is missing, not of this shape, or no weight; where it is read, that
                it is not of finite numbers.
        """
        found, stored, view = self._find(name)
        if shape is not None and found != shape:
            raise CheckpointError(
                f"{name} in {self.source.path} has shape {found}, config.json asks for {shape}"
            )
        floating = str(stored) in _STORED
        if cast and not floating:
            raise CheckpointError(
                f"{name} in {self.source.path} holds {stored} numbers, which are no weights "
                "by themselves; give the original model, or one packed in a known form"
            )
        dtype = self.dtype if cast and self.dtype is not None else stored

        def finish(part: np.ndarray) -> np.ndarray:
            with np.errstate(over="ignore"):
                value = part.astype(dtype, copy=False)
            if floating and not np.isfinite(value).all():
                raise CheckpointError(self._not_finite(name, part, value))
            return value

        return Later(found, dtype, view, finish)

    def tensor(
        self, name: str, shape: tuple[int, ...] | None = None, *, cast: bool = True
    ) -> np.ndarray:
        """One tensor, read; arguments and errors as of `later`."""
        return whole(self.later(name, shape, cast=cast))

    def _not_finite(self, name: str, stored: np.ndarray, value: np.ndarray) -> str:
        count, damaged = (x.size - int(np.isfinite(x).sum()) for x in (value, stored))
        holds = f"{name} in {self.source.path} holds"
        if damaged == 0:
            return f"{holds} {count} numbers beyond {value.dtype}; load it as float32 or bfloat16"
        return (
            f"{holds} {damaged} of {stored.size} numbers that are not finite (NaN or infinity); "
            "give a model whose training did not diverge, or fetch it again"
        )

    def _find(self, name: str) -> tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]:
        """Shape and dtype of a tensor, and what reads it or maps its file."""
        found = self.source.find(name)
        if found is not None:
            self._used.add(found)
            return *self.source.kind(found), lambda: self.source.view(found)
        # compressed-tensors' first versions kept ".weight" in the name of a masked tensor.
        for stem in (name, name.removesuffix(".weight")):
            if self.source.find(f"{stem}.bitmask"):
                return self._masked(stem)
        module = name.removesuffix(".weight")
        if any(self.source.find(f"{module}.{kind}") for kind in ("qweight", "weight_packed")):
            raise CheckpointError(
                f"{module} in {self.source.path} is packed, which only matrices of linear layers "
                "can be; quantise again without it"
            )
        raise CheckpointError(
            f"{self.source.path} lacks the tensor {name}; fetch the checkpoint again"
        )

    def _masked(self, stem: str) -> tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]:
        """As `_find`, of a tensor of which a mask and its values are stored."""
        parts = {kind: self._find(f"{stem}.{kind}") for kind in compressed_tensors.MASKED}
        self._used.add(self.source.find(f"{stem}.row_offsets") or "")

        def read() -> np.ndarray:
            opened = {kind: view() for kind, (_, _, view) in parts.items()}
            return compressed_tensors.from_mask(stem, opened)

        shape = tuple(int(size) for size in parts["shape"][2]().ravel())
        return shape, parts["compressed"][1], read

    def weight(self, name: str, shape: tuple[int, int], bias: bool) -> Dense | Quantized:
        """The weight of module `name`, its large arrays still to be read; `shape` is (out, in)."""
        bias_array = self.tensor(f"{name}.bias", shape[:1]) if bias else None
        if not bias and self.source.find(f"{name}.bias"):
            # Packers write a bias of zeros beside every packed matrix.
            if np.any(self.tensor(f"{name}.bias")):
                raise CheckpointError(
                    f"{name}.bias is in {self.source.path}, but config.json says no bias"
                )
        if self.source.find(f"{name}.qweight"):
            parts, packing, layout = self._parts(name, gptq)
            return gptq.to_weight(name, shape, parts, bias_array, packing, layout)
        if self.source.find(f"{name}.weight_packed"):
            parts, packing, _ = self._parts(name, compressed_tensors)
            return compressed_tensors.to_weight(name, shape, parts, bias_array, packing)
        return Dense(cast(Any, self.later(f"{name}.weight", shape).T), bias_array)

    def _parts(self, name: str, kind) -> tuple[dict[str, np.ndarray | Later], Packing, Layout]:
        """The tensors of a packed matrix, how they are packed, and the whole layout."""
        packing = None if self.layout is None else self.layout.packing(name)
        if self.layout is None or packing is None:
            raise ValueError(
                f"{name} is packed, but the quantization_config of {self.source.path} says nothing "
                "of it"
            )
        there = [part for part in kind.OPTIONAL if self.source.find(f"{name}.{part}")]
        parts = {
            part: (self.later if part in kind.LARGE else self.tensor)(f"{name}.{part}", cast=False)
            for part in (*kind.REQUIRED, *there)
        }
        return parts, packing, self.layout

    def norm(self, name: str, like: Norm) -> Norm:
        """The norm of module `name`, with the parameters that `like` has."""
        shape = (self.config.hidden_dim,)
        scale = None if like.scale is None else self.tensor(f"{name}.weight", shape)
        bias = None if like.bias is None else self.tensor(f"{name}.bias", shape)
        return Norm(scale, bias, centred=like.centred, epsilon=like.epsilon)

    def block(self, layer: int) -> Block:
        """One layer, each matrix as it is stored; leaves are numpy arrays."""
        return whole(self.block_later(layer))

    def block_later(self, layer: int) -> Block:
        """One layer, each matrix as it is stored, its large arrays still to be read."""
        config, names, expected = self.config, self.names, self._expected.layers
        weights = {
            m.name: self.weight(names.weight(layer, m.name), (m.outputs, m.inputs), m.bias)
            for m in matrices(config)
        }
        prefix = names.layer.format(layer)
        attention_norm = self.norm(prefix + names.attention_norm, expected.attention_norm)
        mlp_norm = self.norm(prefix + names.mlp_norm, expected.mlp_norm)
        return Block(weights, attention_norm, mlp_norm, config)

    def without_layers(self) -> Decoder:
        """The model but for its layers (`layers` is None): embedding, positions, norm, head.

        Leaves are numpy arrays.
        """
        outer = {name: whole(part) for name, part in self._outer().items()}
        return Decoder(self.config, layers=cast(Block, None), **outer)

    def _outer(self) -> dict[str, Any]:
        names, expected = self.names, self._expected
        outer: dict[str, Any] = {"final_norm": None}
        for name in ("embedding", "positions"):
            like = getattr(expected, name)
            file_name = f"{getattr(names, name)}.weight"
            if name == "embedding" and self.config.tied_embeddings:
                file_name = self._tied_name()
            outer[name] = None if like is None else self.later(file_name, like.shape)
        if expected.final_norm is not None:
            outer["final_norm"] = self.norm(names.final_norm, expected.final_norm)
        for name in ("head", "project_in", "project_out"):
            like = getattr(expected, name)
            outer[name] = None
            if like is not None:
                inputs, outputs = like.kernel.shape
                weight = self.weight(getattr(names, name), (outputs, inputs), False)
                # Only the matrices of the layers are multiplied as they are packed.
                dtype = outer["embedding"].dtype
                outer[name] = expanded(weight, dtype) if isinstance(weight, Quantized) else weight
        return outer

    def _tied_name(self) -> str:
        """The name of an embedding that is the head too; either of the two may be stored."""
        both = (f"{self.names.embedding}.weight", f"{self.names.head}.weight")
        return next((name for name in both if self.source.find(name)), both[0])

    def decoder(self) -> Decoder:
        """The whole model, to be read where `later.place` puts it."""
        blocks = [self.block_later(layer) for layer in range(self.config.num_layers)]
        return Decoder(self.config, layers=stacked(blocks), **self._outer())

    def check_all_used(self) -> None:
        """Refuses a checkpoint with tensors that were not asked for.

        Raises:
            CheckpointError: naming the first of them.
        """
        tied = {f"{self.names.head}.weight"} if self.config.tied_embeddings else set()
        left = self.source.names - self._used - tied
        left = sorted(name for name in left if not name.endswith(_UNUSED))
        if left:
            raise CheckpointError(
                f"{self.source.path} holds {left[0]}, for which a {self.config.architecture} "
                "model has no use "
                f"({len(left)} such tensors); check config.json against the weights"
            )


def assemble(
    source: Source,
    *,
    dtype="float32",
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable = iter,
) -> Decoder:
    """The model that a checkpoint holds, on its devices; each process reads what its devices have.

    Args:
        dtype: of embeddings, norms and dense matrices; "auto" keeps the file's own.
        mesh: where to place the parameters.
        progress: wraps the iteration over the arrays.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape, or of no use to the architecture.
        ValueError: the configuration asks for something unsupported.
    """
    reader = Reader(source, dtype)
    model = reader.decoder()
    reader.check_all_used()
    return place(model, mesh, progress)


Tensors = Iterator[tuple[str, np.ndarray]]


def disassemble(model: Decoder, *, form: str = "gptq_v2") -> Tensors:
    """The tensors of a model under their Hugging Face names, layer by layer."""
    yield from outer_tensors(model)
    for layer in range(model.config.num_layers):
        yield from block_tensors(model.config, layer, layer_slice(model.layers, layer), form)


def outer_tensors(model: Decoder) -> Tensors:
    """The tensors outside the layers, which no form packs."""
    names = NAMES[model.config.architecture]
    yield f"{names.embedding}.weight", np.asarray(model.embedding[...])
    if model.positions is not None:
        yield f"{names.positions}.weight", np.asarray(model.positions[...])
    if model.final_norm is not None:
        yield from _norm_tensors(names.final_norm, model.final_norm)
    for name in ("head", "project_in", "project_out"):
        weight = getattr(model, name)
        if weight is not None:
            yield from _weight_tensors(getattr(names, name), weight, DENSE)


def block_tensors(
    config: ModelConfig, layer: int, block: Block, form: str, *, dtype: DTypeLike = np.float32
) -> Tensors:
    """The tensors of one layer in a storage form, under their Hugging Face names.

    Args:
        block: one layer, not stacked. In the packed forms a dense matrix stays dense.
        form: one of `quantization.FORMS`.
        dtype: of packed matrices that are written out (`dense`).

    Raises:
        ValueError: a matrix that the form cannot hold.
    """
    names = NAMES[config.architecture]
    prefix = names.layer.format(layer)
    yield from _norm_tensors(prefix + names.attention_norm, block.attention_norm)
    yield from _norm_tensors(prefix + names.mlp_norm, block.mlp_norm)
    for name in block.weight_names:
        weight = getattr(block, name)
        yield from _weight_tensors(names.weight(layer, name), weight, form, dtype)


def block_packings(
    config: ModelConfig, layer: int, block: Block, layout: Layout | None = None
) -> dict[str, Packing | None]:
    """How the matrices of one layer are packed, by module name, as their own arrays say.

    Args:
        layout: the settings they came with; they tell a group of all inputs from -1.
    """
    names, found = NAMES[config.architecture], {}
    for name in block.weight_names:
        weight, module = getattr(block, name), names.weight(layer, name)
        announced = None if layout is None else layout.packing(module)
        found[module] = _packing(weight, announced) if isinstance(weight, Quantized) else None
    return found


def _packing(weight: Quantized, announced: Packing | None) -> Packing:
    groups, inputs = weight.groups, weight.inputs
    size = inputs // groups if groups > 1 else -1
    if announced and announced.group_size > 0 and -(-inputs // announced.group_size) == groups:
        size = announced.group_size
    runs = np.arange(inputs) // (size if size > 0 else inputs)
    indexed = not np.array_equal(gptq.group_index(weight), runs)
    return Packing(weight.bits, size, compressed_tensors.is_symmetric(weight), indexed)


def _norm_tensors(name: str, norm: Norm) -> Tensors:
    for kind, value in (("weight", norm.scale), ("bias", norm.bias)):
        if value is not None:
            yield f"{name}.{kind}", np.asarray(value[...])


def _weight_tensors(name: str, weight, form: str, dtype: DTypeLike = np.float32) -> Tensors:
    if isinstance(weight, Quantized):
        for kind, value in _packed_tensors(name, weight, form, dtype).items():
            yield f"{name}.{kind}", value
    elif isinstance(weight, Dense) and form in SPARSE_FORMS:
        for kind, value in compressed_tensors.to_mask(name, weight, form).items():
            yield f"{name}.{kind}", value
    elif isinstance(weight, Dense):
        yield f"{name}.weight", np.ascontiguousarray(np.asarray(weight.kernel[...]).T)
    else:
        raise TypeError(
            f"{name}: a {type(weight).__name__} weight has no Hugging Face form; save its base"
        )
    if weight.bias is not None:
        yield f"{name}.bias", np.asarray(weight.bias[...])


def _packed_tensors(
    name: str, weight: Quantized, form: str, dtype: DTypeLike
) -> dict[str, np.ndarray]:
    if form in SPARSE_FORMS:
        raise ValueError(f"{name} is packed and cannot be stored as {form}; give a pruned model")
    if form == DENSE:
        return {"weight": np.asarray(expanded(weight, dtype).kernel[...]).T}
    if form == PACK_QUANTIZED:
        return compressed_tensors.from_weight(weight)
    return gptq.from_weight(name, weight, form)
