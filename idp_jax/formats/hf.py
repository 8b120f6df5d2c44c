"""Hugging Face's tensor names, and how a model is put together from them and taken apart again.

One table per architecture gives the name of every parameter; linear weights are [out, in] on disk
and [in, out] in the modules. A weight
whose name ends in `.qweight` is packed (see `gptq.py`), any other is dense.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax.formats import gptq
from idp_jax.formats.source import CheckpointError, Source
from idp_jax.models.block import Block, layer_slice
from idp_jax.models.config import ModelConfig, from_hf
from idp_jax.models.decoder import OPT_POSITION_OFFSET, Decoder
from idp_jax.models.layers import Norm
from idp_jax.weights import Dense, Quantized


@dataclass(frozen=True)
class Names:
    """The tensor names of one architecture; `{}` in `layer` is the layer's number."""

    layer: str
    weights: dict[str, str]
    attention_norm: str
    mlp_norm: str
    embedding: str
    final_norm: str
    head: str = "lm_head"
    positions: str = ""
    project_in: str = ""
    project_out: str = ""

    def weight(self, layer: int, name: str) -> str:
        """The module that holds matrix `name` (as in `block.STAGES`) of a layer."""
        return self.layer.format(layer) + self.weights[name]


NAMES = {
    "llama": Names(
        layer="model.layers.{}.",
        weights={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.o_proj",
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        },
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        embedding="model.embed_tokens",
        final_norm="model.norm",
    ),
    "opt": Names(
        layer="model.decoder.layers.{}.",
        weights={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.out_proj",
            "up": "fc1",
            "down": "fc2",
        },
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        positions="model.decoder.embed_positions",
        project_in="model.decoder.project_in",
        project_out="model.decoder.project_out",
    ),
}
_BIASES = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
_DTYPES = ("float32", "bfloat16", "float16")
_UNUSED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


def _float_dtype(name) -> np.dtype:
    if str(name) not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; supported: auto, {', '.join(_DTYPES)}")
    return jnp.dtype(name)


class _Assembler:
    """Reads the parameters of one checkpoint, converts them, and remembers which it used."""

    def __init__(self, source: Source, dtype):
        self.source = source
        self.config: ModelConfig = from_hf(source.hf_config)
        self.names = NAMES[self.config.architecture]
        self.dtype = None if dtype == "auto" else _float_dtype(dtype)
        self.packing = gptq.read_settings(source.quantization)
        self.used: set[str] = set()

    def tensor(
        self, name: str, shape: tuple[int, ...] | None = None, *, cast: bool = True
    ) -> np.ndarray:
        # OPT's oldest checkpoints leave out the leading "model.".
        found = next(
            (n for n in (name, name.removeprefix("model.")) if n in self.source.names), None
        )
        if found is None:
            raise CheckpointError(
                f"{self.source.path} lacks the tensor {name}; fetch the checkpoint again"
            )
        self.used.add(found)
        value = self.source.read(found)
        if shape is not None and value.shape != shape:
            raise CheckpointError(
                f"{found} in {self.source.path} has shape {value.shape}, config.json asks for "
                f"{shape}"
            )
        floating = value.dtype.kind in "fV"  # V: numpy's kind of bfloat16
        return value.astype(self.dtype) if cast and floating and self.dtype is not None else value

    def has(self, name: str) -> bool:
        return bool({name, name.removeprefix("model.")} & self.source.names)

    def weight(self, name: str, shape: tuple[int, int], bias: bool) -> Dense | Quantized:
        """The weight of module `name`; `shape` is (out, in)."""
        bias_array = self.tensor(f"{name}.bias", shape[:1]) if bias else None
        if not bias and self.has(f"{name}.bias"):
            # Packers write a bias of zeros beside every packed matrix.
            if np.any(self.tensor(f"{name}.bias")):
                raise CheckpointError(
                    f"{name}.bias is in {self.source.path}, but config.json says no bias"
                )
        if self.has(f"{name}.qweight"):
            kinds = ("qweight", "qzeros", "scales")
            parts = {kind: self.tensor(f"{name}.{kind}", cast=False) for kind in kinds}
            group_index = self.tensor(f"{name}.g_idx") if self.has(f"{name}.g_idx") else None
            return gptq.to_weight(name, shape, parts, group_index, bias_array, self.packing)
        return Dense(np.ascontiguousarray(self.tensor(f"{name}.weight", shape).T), bias_array)

    def norm(self, name: str) -> Norm:
        config = self.config
        layer_norm, shape = config.architecture == "opt", (config.hidden_dim,)
        scale = self.tensor(f"{name}.weight", shape) if config.norm_affine else None
        bias = self.tensor(f"{name}.bias", shape) if config.norm_affine and layer_norm else None
        return Norm(scale, bias, centred=layer_norm, epsilon=config.norm_epsilon)

    def shapes(self) -> dict[str, tuple[int, int]]:
        c = self.config
        queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        return {
            "q": (queries, c.hidden_dim),
            "k": (keys, c.hidden_dim),
            "v": (keys, c.hidden_dim),
            "o": (c.hidden_dim, queries),
            "gate": (c.ffw_dim, c.hidden_dim),
            "up": (c.ffw_dim, c.hidden_dim),
            "down": (c.hidden_dim, c.ffw_dim),
        }

    def block(self, layer: int) -> Block:
        config, names, shapes = self.config, self.names, self.shapes()
        biased = (
            *(_BIASES["attention"] if config.attention_bias else ()),
            *(_BIASES["mlp"] if config.mlp_bias else ()),
        )
        weights = {
            name: self.weight(names.weight(layer, name), shapes[name], name in biased)
            for name in names.weights
        }
        prefix = names.layer.format(layer)
        norms = self.norm(prefix + names.attention_norm), self.norm(prefix + names.mlp_norm)
        return Block(weights, *norms, config)

    def decoder(self, progress: Callable = iter) -> Decoder:
        config, names = self.config, self.names
        embedding = self.tensor(
            f"{names.embedding}.weight", (config.vocab_size, config.embedding_dim)
        )
        projected = config.embedding_dim != config.hidden_dim
        inward, outward = (
            (config.hidden_dim, config.embedding_dim),
            (config.embedding_dim, config.hidden_dim),
        )
        places = (config.max_positions + OPT_POSITION_OFFSET, config.hidden_dim)
        parts = {
            "final_norm": self.norm(names.final_norm) if config.final_norm else None,
            "head": None
            if config.tied_embeddings
            else self.weight(names.head, (config.vocab_size, config.embedding_dim), False),
            "positions": self.tensor(f"{names.positions}.weight", places)
            if names.positions
            else None,
            "project_in": self.weight(names.project_in, inward, False) if projected else None,
            "project_out": self.weight(names.project_out, outward, False) if projected else None,
        }
        blocks = [self.block(layer) for layer in progress(range(config.num_layers))]
        return Decoder(config, embedding=embedding, layers=_stack(blocks), **parts)

    def check_all_used(self) -> None:
        tied = {f"{self.names.head}.weight"} if self.config.tied_embeddings else set()
        left = self.source.names - self.used - tied
        left = sorted(name for name in left if not name.endswith(_UNUSED))
        if left:
            raise CheckpointError(
                f"{self.source.path} holds {left[0]}, for which a {self.config.architecture} "
                "model has no use "
                f"({len(left)} such tensors); check config.json against the weights"
            )


def _stack(blocks: list[Block]) -> Block:
    """Blocks read from disk as one; each block's own arrays are given up as they are copied."""
    flat = [jax.tree.flatten(block) for block in blocks]
    structure = flat[0][1]
    for layer, (_, other) in enumerate(flat):
        if other != structure:
            raise CheckpointError(
                f"layer {layer} is stored otherwise than layer 0 (another bit width, or not "
                "packed); "
                "layers of one model must be stored alike"
            )
    leaves = [leaves for leaves, _ in flat]
    stacked = []
    for position in range(len(leaves[0])):
        stacked.append(np.stack([layer[position] for layer in leaves]))
        for layer in leaves:
            layer[position] = None
    return jax.tree.unflatten(structure, stacked)


def assemble(source: Source, *, dtype="float32", progress: Callable = iter) -> Decoder:
    """Builds the model that a checkpoint holds, with numpy arrays as leaves.

    Args:
        dtype: of embeddings, norms and dense matrices; "auto" keeps the file's own.
        progress: wraps the iteration over layers.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape, or of no use to the architecture.
        ValueError: the configuration asks for something unsupported.
    """
    assembler = _Assembler(source, dtype)
    model = assembler.decoder(progress)
    assembler.check_all_used()
    return model


def disassemble(
    model: Decoder, *, checkpoint_format: str = "gptq_v2"
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a model under their Hugging Face names, layer by layer."""
    names = NAMES[model.config.architecture]
    yield f"{names.embedding}.weight", np.asarray(model.embedding[...])
    if model.positions is not None:
        yield f"{names.positions}.weight", np.asarray(model.positions[...])
    if model.final_norm is not None:
        yield from _norm_tensors(names.final_norm, model.final_norm)
    for name in ("head", "project_in", "project_out"):
        weight = getattr(model, name)
        if weight is not None:
            yield from _weight_tensors(getattr(names, name), weight, checkpoint_format)
    for layer in range(model.config.num_layers):
        block = layer_slice(model.layers, layer)
        prefix = names.layer.format(layer)
        yield from _norm_tensors(prefix + names.attention_norm, block.attention_norm)
        yield from _norm_tensors(prefix + names.mlp_norm, block.mlp_norm)
        for name in block.weight_names:
            module = names.weight(layer, name)
            yield from _weight_tensors(module, getattr(block, name), checkpoint_format)


def _norm_tensors(name: str, norm: Norm) -> Iterator[tuple[str, np.ndarray]]:
    for kind, value in (("weight", norm.scale), ("bias", norm.bias)):
        if value is not None:
            yield f"{name}.{kind}", np.asarray(value[...])


def _weight_tensors(name: str, weight, checkpoint_format: str) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(weight, Quantized):
        for kind, value in gptq.from_weight(weight, checkpoint_format).items():
            yield f"{name}.{kind}", value
    elif isinstance(weight, Dense):
        yield f"{name}.weight", np.ascontiguousarray(np.asarray(weight.kernel[...]).T)
    else:
        raise TypeError(
            f"{name}: a {type(weight).__name__} weight has no Hugging Face form; save its base"
        )
    if weight.bias is not None:
        yield f"{name}.bias", np.asarray(weight.bias[...])
