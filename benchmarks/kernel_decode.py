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
from transformers import LlamaConfig

from idp_jax.evaluation.latency import latency
from idp_jax.kernels.bench.speed import copy_bandwidth
from idp_jax.kernels.devices import best_backend
from idp_jax.models import ModelConfig
from idp_jax.models.abstract import Storage, random
from idp_jax.models.config import from_hf


def configuration(layers: int, hidden: int) -> ModelConfig:
    """LLaMA-7B's shape, or a smaller one of the same proportions."""
    heads = max(1, hidden // 128)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=-(-hidden * 8 // 3 // 256) * 256,
        vocab_size=32000,
    )
    return from_hf(config)


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
    print(f"{device}, jax {jax.__version__}, backend {chosen}, copy {bandwidth / 1e9:.0f} GB/s")
    packed = Storage(arguments.bits, arguments.group_size, backend=arguments.backend)
    base = None
    for name, weights in ((arguments.dtype, Storage()), (f"{arguments.bits} bit", packed)):
        model = random(config, jax.random.key(0), dtype=arguments.dtype, weights=weights)
        # Of the embedding a step reads one row.
        read = sum(leaf.nbytes for leaf in jax.tree.leaves(model)) - model.embedding[...].nbytes
        step = latency(
            model, prompt_length=arguments.prompt_length, new_tokens=arguments.new_tokens
        )
        seconds = step.decode_ms_per_token / 1000
        base = base or seconds
        print(
            f"{name}: {1000 * seconds:.3f} ms per token, {base / seconds:.2f} times "
            f"{arguments.dtype}, {read / bandwidth / seconds:.0%} of the roofline "
            f"({read / 2**30:.2f} GiB), prompt {step.prefill_ms:.1f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
