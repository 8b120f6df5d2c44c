"""A training step of a LLaMA-7B-shaped model on this machine's accelerator: time, tokens, MFU.

    python benchmarks/training_step.py --method lora --bits 3,none --rows 4 --length 2048

Weights are random and made on the device, so nothing is downloaded. MFU is the operations that the
mathematics needs (two ways through model and head, no gradient of frozen matrices; text tokens
alone) over the vendor's bfloat16 peak; what `--remat layer` computes again does not count, and of a
device whose peak is not known nothing is said. "GiB so far" is the most that the process has held,
of the rows above, too.
"""

import argparse
import time
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from kernel_decode import configuration

from idp_jax.config import Optimizer
from idp_jax.data.batch import Batch
from idp_jax.jobs.chips import chip_here
from idp_jax.jobs.machine import peak_memory
from idp_jax.kernels.bench.cases import parse_bits
from idp_jax.models import Decoder
from idp_jax.models.abstract import Storage, random
from idp_jax.models.decoder import Remat
from idp_jax.recover import LoraAdapter, SoftPrompt
from idp_jax.training.objectives import make_objective
from idp_jax.training.plan import forward
from idp_jax.training.step import TrainState, make_optimizer, make_train_step

ADAPTERS = {
    "lora": lambda model: LoraAdapter.init(model, 8, jax.random.key(0)),
    "prompt": lambda model: SoftPrompt.init(model, 100, jax.random.key(0)),
}


def seconds_per_step(model: Decoder, method: str, batch: Batch, remat: Remat, steps: int) -> float:
    """Median seconds over three runs of so many steps, dispatched one behind the other."""
    optimizer = make_optimizer(Optimizer(schedule="constant"), 1e-4, steps)
    step = make_train_step(optimizer, make_objective("ce", remat=remat), steps=steps)
    state, metrics = TrainState.start(ADAPTERS[method](model), optimizer), {}
    times = []
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, model, batch)
        jax.block_until_ready((state, metrics))
        times.append((time.perf_counter() - start) / steps)
    if not np.isfinite(float(metrics["loss"])):
        raise ValueError(f"the loss of a {method} step is {float(metrics['loss'])}")
    return float(np.median(times[1:]))


def main() -> None:
    """Prints a table row for each form of the weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="lora", choices=tuple(ADAPTERS))
    parser.add_argument("--bits", default="3,none", help="with commas; none is bfloat16")
    parser.add_argument("--rows", type=int, default=4, help="windows of a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5, help="timed together")
    parser.add_argument("--remat", choices=get_args(Remat), default="layer", help="made again")
    arguments = parser.parse_args()
    config, device = configuration(arguments.layers, arguments.hidden), jax.devices()[0].device_kind
    chip, size = chip_here(device), (arguments.rows, arguments.length)
    batch = Batch(jax.random.randint(jax.random.key(1), size, 0, config.vocab_size, jnp.int32))
    useful = 2 * arguments.rows * forward(config, arguments.length)
    peak = "peak not known" if chip is None else f"peak {chip.flops / 1e12:.0f} Tflop/s"
    print(f"{device}, jax {jax.__version__}, {peak}, remat {arguments.remat}\n")
    print("| weights | trained | windows x tokens | ms | tokens/s | Tflop/s | MFU | GiB so far |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for bits in parse_bits(arguments.bits):
        weights = Storage() if bits is None else Storage(bits, backend="auto")
        model = random(config, jax.random.key(0), dtype="bfloat16", weights=weights)
        seconds = seconds_per_step(model, arguments.method, batch, arguments.remat, arguments.steps)
        mfu = "" if chip is None else f"{useful / seconds / chip.flops:.1%}"
        held = peak_memory().get("device")
        print(
            f"| {'bf16' if bits is None else f'{bits} bit'} | {arguments.method} "
            f"| {size[0]} x {size[1]} | {1000 * seconds:.1f} "
            f"| {size[0] * size[1] / seconds:,.0f} | {useful / seconds / 1e12:.3g} | {mfu} "
            f"| {'' if held is None else f'{held / 2**30:.1f}'} |",
            flush=True,
        )
        del model


if __name__ == "__main__":
    main()
