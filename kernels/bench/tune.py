"""Measures block sizes on the accelerator of this machine and writes the best ones to tuned.json.

    python kernels/bench/tune.py --model LLaMA-7B --kernels quant --bits 3,4

Kernels only ever look the table up. A size that does not fit the device's memory is skipped. With
`--missing` a run that was stopped goes on.
"""

import argparse
import functools
import itertools
import json
import sys

import jax
import jax.numpy as jnp

from idp_jax.kernels import gpu_blocks, tuned
from idp_jax.kernels.bench import cases
from idp_jax.kernels.bench.shapes import ROWS, SHAPES
from idp_jax.kernels.bench.speed import copies, seconds_per_call
from idp_jax.kernels.devices import best_backend, device_kind
from idp_jax.kernels.dispatch import arrangement_of
from idp_jax.kernels.quant_matmul.sizes import DECODE_ROWS


def table_key(
    backend: str, kernel: str, bits: int | None, shape: tuple[int, int], rows: int
) -> str:
    """Where the sizes of a kernel at a shape stand in the table.

    Args:
        backend: "pallas_tpu" or "mosaic_gpu".
        kernel: "quant" or "sparse24".
        bits: None for 2:4 with bfloat16 values.
        shape: inputs and outputs.
        rows: of x.
    """
    few = rows <= DECODE_ROWS
    name, taken = {
        ("pallas_tpu", "quant"): ("decode" if few else "prefill", bits),
        ("pallas_tpu", "sparse24"): ("sparse24", bits or 16),
        ("mosaic_gpu", "quant"): ("gpu", bits),
        # For every input half a value and half a position of 2 bits.
        ("mosaic_gpu", "sparse24"): ("gpu", 9) if bits is None else ("gpu512", bits / 2 + 1),
    }[backend, kernel]
    return tuned.key(name, taken, *shape, rows)


def candidates(name: str, rows: int) -> list[list[int]]:
    """Sizes to try for a key of the table, in its form."""
    kernel = name.split()[0]
    if kernel == "decode":
        return [[outputs] for outputs in (128, 256, 512, 1024, 2048)]
    if kernel in ("prefill", "sparse24"):
        rows_of_block = sorted({min(rows, m) for m in (256, 512, 1024)})
        return [list(b) for b in itertools.product(rows_of_block, (256, 512, 1024), (512, 1024))]
    block_rows = sorted({min(-(-rows // 8) * 8, m) for m in (16, 64, 128)})
    return [list(s) for s in itertools.product(block_rows, (1, 2, 4, 8), (2, 4, 8))]


def best_sizes(
    backend: str, kernel: str, bits: int | None, shape: tuple[int, int], rows: int
) -> list[int]:
    """The fastest candidate, measured."""
    device = device_kind()
    table = tuned.table().setdefault(device, {})
    name = table_key(backend, kernel, bits, shape, rows)
    kind = cases.Kind(kernel, bits, -1 if bits is None else 128)
    make = lambda key: cases.random_weight(key, kind, *shape, arrangement_of(backend))
    weights = copies(make, cases.stored_bytes(make(jax.random.key(0))))
    x = jax.random.normal(jax.random.key(1), (rows, shape[0]), jnp.bfloat16)
    times = {}
    for sizes in candidates(name, rows):
        table[name] = sizes
        # A new function object, or jit would remember the sizes before.
        multiply = functools.partial(cases.multiply(kernel, backend))
        try:
            times[tuple(sizes)] = seconds_per_call(multiply, x, weights)
        except Exception as error:  # whatever the compiler finds wrong
            print(f"{name} {sizes}: {cases.first_line(error)}")
    if not times:
        del table[name]
        raise ValueError(f"no candidate runs for {name}: extend `candidates` in tune.py")
    best = min(times, key=lambda sizes: times[sizes])
    table[name] = list(best)
    print(f"{device}, {name}: {list(best)} {times[best] * 1e6:.1f} us", flush=True)
    return list(best)


def main() -> int:
    """Tunes every shape of a model; the table is written after each, so it can be interrupted.

    Returns:
        1 if a kernel ran with no size at all, else 0.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="LLaMA-7B", choices=sorted(SHAPES))
    parser.add_argument("--kernels", default="quant,sparse24", help="with commas")
    parser.add_argument("--bits", default=cases.EVERY_BITS, help=cases.BITS_HELP)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of x, with commas")
    parser.add_argument("--missing", action="store_true", help="only what the table does not have")
    arguments = parser.parse_args()
    backend = best_backend()
    if backend == "xla":
        parser.error("there is nothing to tune on a CPU: run this where a TPU or a GPU is")
    rows_served = gpu_blocks.MOST_ROWS if backend == "mosaic_gpu" else max(ROWS)
    rows = [m for m in map(int, arguments.rows.split(",")) if m <= rows_served]
    kernels, bits = arguments.kernels.split(","), cases.parse_bits(arguments.bits)
    known = tuned.table().get(device_kind(), {}) if arguments.missing else {}
    failures = 0
    for case in itertools.product(kernels, bits, SHAPES[arguments.model], rows):
        if case[:2] == ("quant", None) or table_key(backend, *case) in known:
            continue
        try:
            best_sizes(backend, *case)
        except ValueError as error:
            print(error, flush=True)
            failures += 1
        _write()
    return failures > 0


def _write() -> None:
    partial = tuned.TABLE.with_suffix(".partial")
    partial.write_text(json.dumps(tuned.table(), indent=1, sort_keys=True) + "\n")
    partial.replace(tuned.TABLE)


if __name__ == "__main__":
    sys.exit(main())
