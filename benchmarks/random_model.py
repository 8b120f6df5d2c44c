"""Randomly initialised models for the benchmarks, written as Hugging Face folders without torch.

The invariant: one layer is in memory at a time, however large the model.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from idp_jax.formats.names import NAMES, matrix_shapes
from idp_jax.models.config import ModelConfig, from_hf
from idp_jax.models.decoder import OPT_POSITION_OFFSET

_DEVIATION = 0.02


def opt_config(layers: int, width: int, vocabulary: int = 50272, positions: int = 2048) -> dict:
    """config.json of an OPT; 24 layers of width 2048 are the shape of OPT-1.3B."""
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "num_attention_heads": max(width // 64, 1),
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "do_layer_norm_before": True,
        "activation_function": "relu",
    }


def write_model(folder: Path, config: dict, *, seed: int = 0) -> int:
    """Writes a model in bfloat16, one file a layer, with a tokenizer of words w0, w1, ...

    Args:
        folder: made by this call.
        config: a LLaMA's or an OPT's config.json, embedding and head tied, without projections.

    Returns:
        Bytes of its safetensors.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2))
    known = from_hf(AutoConfig.from_pretrained(folder))
    _tokenizer(known.vocab_size).save_pretrained(folder)
    rng, places, size = np.random.default_rng(seed), {}, 0
    for number in range(known.num_layers + 1):
        tensors = dict(_outer(known, rng) if number == 0 else _layer(known, number - 1, rng))
        file = folder / f"model-{number + 1:05d}-of-{known.num_layers + 1:05d}.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
        size += file.stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def write_text(file: Path, vocabulary: int, tokens: int, *, seed: int = 0) -> None:
    """Writes words drawn at random: a text of so many tokens."""
    words = np.random.default_rng(seed).integers(0, vocabulary, tokens)
    file.write_text(" ".join(f"w{word}" for word in words))


def command(*arguments: object) -> list[str]:
    """The command line `idp-jax ARGUMENTS`, of this interpreter."""
    call = "from idp_jax.cli import main; main()"
    return [sys.executable, "-c", call, *map(str, arguments)]


def start(*arguments: object, log: Path, **variables: str) -> subprocess.Popen:
    """`idp-jax ARGUMENTS` of this checkout in another process, its output added to a file.

    Args:
        variables: of the process' environment, beside those of this one.
    """
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | variables
    with log.open("a") as file:
        return subprocess.Popen(command(*arguments), stdout=file, stderr=file, env=variables)


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {f"w{number}": number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    values = rng.standard_normal(shape, np.float32)
    values *= _DEVIATION
    return values.astype(ml_dtypes.bfloat16)


def _outer(config: ModelConfig, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    names = NAMES[config.architecture]
    yield f"{names.embedding}.weight", _draw(rng, config.vocab_size, config.hidden_dim)
    if names.positions:
        rows = config.max_positions + OPT_POSITION_OFFSET
        yield f"{names.positions}.weight", _draw(rng, rows, config.hidden_dim)
    yield from _norm(names.final_norm, config)


def _layer(
    config: ModelConfig, layer: int, rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    names = NAMES[config.architecture]
    for name, shape in matrix_shapes(config).items():
        yield f"{names.weight(layer, name)}.weight", _draw(rng, *shape)
        if config.attention_bias:
            yield f"{names.weight(layer, name)}.bias", _draw(rng, shape[0])
    for norm in (names.attention_norm, names.mlp_norm):
        yield from _norm(names.layer.format(layer) + norm, config)


def _norm(name: str, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{name}.weight", np.ones(config.hidden_dim, ml_dtypes.bfloat16)
    if config.architecture == "opt":
        yield f"{name}.bias", np.zeros(config.hidden_dim, ml_dtypes.bfloat16)
