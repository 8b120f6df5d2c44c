"""Batch-1 decoding of a LLaMA-7B-shaped model with packed weights against dense ones, in one run.

    python benchmarks/kernel_decode.py --bits 3 --group-size 128

Weights are random and made on the device, so nothing is downloaded. Prints milliseconds per token,
the ratio to dense weights, the share of the roofline (bytes of all weights over the bandwidth of a
copy in the same run), and the time of reading the prompt. On a CPU, where `--weights auto` must
choose between both:

    python benchmarks/kernel_decode.py --dtype float32 --layers 30 --hidden 576 --group-size 64
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import llama_model

from idp_jax.evaluation.latency import latency
from idp_jax.kernels.bench.speed import copy_bandwidth
from idp_jax.kernels.devices import best_backend
from idp_jax.models import ModelConfig
from idp_jax.weights import Dense, Quantized, for_kernels


def configuration(layers: int, hidden: int) -> ModelConfig:
    """LLaMA-7B's shape, or a smaller one of the same proportions."""
    ffw = -(-hidden * 8 // 3 // 256) * 256
    return llama_model.configuration(
        layers, hidden, head_dim=128, ffw=ffw, vocabulary=32000, tied=False
    )


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _dense(key: jax.Array, layers: int, inputs: int, outputs: int, dtype: str) -> Dense:
    kernel = jax.random.normal(key, (layers, inputs, outputs), dtype)
    return Dense(kernel * jnp.asarray(inputs**-0.5, dtype))


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))
def _packed(
    key: jax.Array, layers: int, inputs: int, outputs: int, bits: int, group_size: int, backend: str
):
    groups = 1 if group_size == -1 else inputs // group_size
    keys = jax.random.split(key, 3)
    words = jax.random.bits(keys[0], (layers, inputs * bits // 32, outputs), jnp.uint32)
    scale = inputs**-0.5 / 2 ** (bits - 1)
    scales = jax.random.uniform(keys[1], (layers, groups, outputs), minval=0.5, maxval=1.5) * scale
    zeros = jax.random.randint(keys[2], (layers, groups, outputs), 0, 2**bits)
    weight = Quantized(
        jax.lax.bitcast_convert_type(words, jnp.int32),
        scales.astype(jnp.float16),
        zeros.astype(jnp.uint8),
        bits=bits,
    )
    return for_kernels(weight, backend=backend)


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
    layers = config.num_layers
    packed = lambda key, i, o: _packed(
        key, layers, i, o, arguments.bits, arguments.group_size, arguments.backend
    )
    base = None
    for name, make in (
        (arguments.dtype, lambda key, i, o: _dense(key, layers, i, o, arguments.dtype)),
        (f"{arguments.bits} bit", packed),
    ):
        model = llama_model.decoder(config, make, jnp.dtype(arguments.dtype))
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
