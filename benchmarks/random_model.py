"""Randomly initialised models for the benchmarks, written as Hugging Face folders without torch.

The invariant: one layer is in memory at a time, however large the model.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from idp_jax.formats.hf import block_tensors, outer_tensors
from idp_jax.models.abstract import random, random_layers
from idp_jax.models.block import layer_slice
from idp_jax.models.config import from_hf


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
        config: a LLaMA's or an OPT's config.json.

    Returns:
        Bytes of its safetensors.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2))
    known = from_hf(AutoConfig.from_pretrained(folder))
    _tokenizer(known.vocab_size).save_pretrained(folder)
    key, one_layer = jax.random.key(seed), replace(known, num_layers=1)
    places, size = {}, 0
    for number in range(known.num_layers + 1):
        if number == 0:
            tensors = dict(outer_tensors(random(one_layer, key, dtype="bfloat16")))
        else:
            layers = random_layers(one_layer, jax.random.fold_in(key, number), dtype="bfloat16")
            tensors = dict(block_tensors(known, number - 1, layer_slice(layers, 0), "dense"))
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
