"""Batch-1 decoding of a LLaMA-7B-shaped model with packed weights against dense ones, in one run.

    python benchmarks/kernel_decode.py --bits 3 --group-size 128

Weights are random and made on the device, so nothing is downloaded. Prints milliseconds per token,
the ratio to dense weights, the share of the roofline (bytes of all weights over the bandwidth of a
copy in the same run), and the time of reading the prompt. On a CPU, where `--weights auto` must
choose between both:

    python benchmarks/kernel_decode.py --dtype float32 --layers 30 --hidden 576 --group-size 64
"""

import argparse

import jax
import numpy as np

from idp_jax.inference.timing import time_generation
from idp_jax.kernels.bench.speed import copy_bandwidth
from idp_jax.kernels.devices import best_backend
from idp_jax.models import ModelConfig
from idp_jax.models.abstract import Storage, random
from idp_jax.models.config import RopeConfig
from idp_jax.recover import Repaired

REPEATS = 5


def configuration(layers: int, hidden: int) -> ModelConfig:
    """LLaMA-7B's shape, or a smaller one of the same proportions; transformers is not needed."""
    heads = max(1, hidden // 128)
    return ModelConfig(
        architecture="llama",
        vocab_size=32000,
        num_layers=layers,
        hidden_dim=hidden,
        embedding_dim=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        ffw_dim=-(-hidden * 8 // 3 // 256) * 256,
        max_positions=2048,
        activation="silu",
        norm_epsilon=1e-6,
        norm_before=True,
        final_norm=True,
        norm_affine=True,
        attention_bias=False,
        mlp_bias=False,
        tied_embeddings=False,
        rope=RopeConfig(10000.0, "default"),
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=None,
    )


def main() -> None:
    """Prints a line for dense and one for packed weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prompt-length", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    config = configuration(arguments.layers, arguments.hidden)
    bandwidth = copy_bandwidth()
    device = jax.devices()[0].device_kind
    chosen = best_backend() if arguments.backend == "auto" else arguments.backend
    print(f"{device}, jax {jax.__version__}, backend {chosen}, copy {bandwidth / 1e9:.0f} GB/s\n")
    packed = Storage(arguments.bits, arguments.group_size, backend=arguments.backend)
    prompt = np.random.default_rng(0).integers(
        0, config.vocab_size, (1, arguments.prompt_length), np.int32
    )
    print("| weights | ms/token | times | of the roofline | GiB read | prompt, ms |")
    print("|---|---|---|---|---|---|", flush=True)
    base = None
    for name, weights in ((arguments.dtype, Storage()), (f"{arguments.bits} bit", packed)):
        model = random(config, jax.random.key(0), dtype=arguments.dtype, weights=weights)
        # Of the embedding a step reads one row.
        read = sum(leaf.nbytes for leaf in jax.tree.leaves(model)) - model.embedding[...].nbytes
        times = time_generation(
            Repaired(model), prompt, new_tokens=arguments.new_tokens, repeats=REPEATS
        )
        reading, decoding = np.median(times, axis=0)
        seconds = float(decoding) / arguments.new_tokens
        base = base or seconds
        print(
            f"| {name} | {1000 * seconds:.3f} | {base / seconds:.2f} "
            f"| {read / bandwidth / seconds:.0%} | {read / 2**30:.2f} | {1000 * reading:.1f} |",
            flush=True,
        )
        del model


if __name__ == "__main__":
    main()
