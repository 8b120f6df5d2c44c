"""Measures block sizes on the accelerator of this machine and writes the best ones to tuned.json.

    python kernels/bench/tune.py --model LLaMA-7B --bits 3,4

Kernels only ever look the table up. A size that does not fit the device's memory is skipped.
"""

import argparse
import functools
import itertools
import json

import jax
import jax.numpy as jnp
from idp_jax.kernels.bench import cases
from idp_jax.kernels.bench.shapes import ROWS, SHAPES
from idp_jax.kernels.bench.speed import copies, seconds_per_call
from idp_jax.kernels.dispatch import best_backend
from idp_jax.kernels.quant_matmul import config


def candidates(kernel: str, rows: int) -> list[list[int]]:
    """Sizes to try, in the form of the table."""
    if kernel == "decode":
        return [[outputs] for outputs in (128, 256, 512, 1024, 2048)]
    if kernel == "prefill":
        rows_of_block = sorted({min(rows, m) for m in (256, 512, 1024)})
        return [list(b) for b in itertools.product(rows_of_block, (256, 512, 1024), (512, 1024))]
    block_rows = sorted({min(-(-rows // 8) * 8, m) for m in (16, 64, 128)})
    return [list(s) for s in itertools.product(block_rows, (1, 2, 4, 8), (2, 4, 8))]


def kernel_of(backend: str, rows: int) -> str:
    """The table's name of the kernel that serves this many rows."""
    if backend == "mosaic_gpu":
        return "gpu"
    return "decode" if rows <= config.DECODE_ROWS else "prefill"


def best_sizes(backend: str, bits: int, shape: tuple[int, int], rows: int) -> list[int]:
    """The fastest candidate, measured."""
    kind = jax.devices()[0].device_kind
    kernel = kernel_of(backend, rows)
    table = config.tuned().setdefault(kind, {})
    name = config.key(kernel, bits, *shape, rows)
    order = cases.arrangement_of(backend)
    make = lambda key: cases.quantised(key, bits, 128, *shape, order)
    weights = copies(make, cases.stored_bytes(make(jax.random.key(0))))
    x = jax.random.normal(jax.random.key(1), (rows, shape[0]), jnp.bfloat16)
    times = {}
    for sizes in candidates(kernel, rows):
        table[name] = sizes
        # A new function object, or jit would remember the sizes before.
        multiply = functools.partial(cases.multiply("quant", backend))
        try:
            times[tuple(sizes)] = seconds_per_call(multiply, x, weights)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            print(f"{name} {sizes}: {str(error).splitlines()[0][:100]}")
    if not times:
        del table[name]
        raise ValueError(f"no candidate runs for {name}: extend `candidates` in tune.py")
    best = min(times, key=lambda sizes: times[sizes])
    table[name] = list(best)
    print(f"{kind}, {name}: {list(best)} {times[best] * 1e6:.1f} us", flush=True)
    return list(best)


def main() -> None:
    """Tunes every shape of a model; the table is written after each, so it can be interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="LLaMA-7B", choices=sorted(SHAPES))
    parser.add_argument("--bits", default="2,3,4,8", help="with commas")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of x, with commas")
    arguments = parser.parse_args()
    backend = best_backend()
    if backend == "xla":
        parser.error("there is nothing to tune on a CPU: run this where a TPU or a GPU is")
    numbers = lambda text: list(map(int, text.split(",")))
    rows_served = config.GPU_ROWS if backend == "mosaic_gpu" else max(ROWS)
    for bits in numbers(arguments.bits):
        for shape in SHAPES[arguments.model]:
            for rows in filter(lambda m: m <= rows_served, numbers(arguments.rows)):
                best_sizes(backend, bits, shape, rows)
                _write()


def _write() -> None:
    partial = config.TABLE.with_suffix(".partial")
    partial.write_text(json.dumps(config.tuned(), indent=1, sort_keys=True) + "\n")
    partial.replace(config.TABLE)


if __name__ == "__main__":
    main()
