"""Measures the kernels on the accelerator of this machine: time, bandwidth, ratio to bfloat16.

    python kernels/bench/speed.py --table kernels/bench/h100.md

For each shape: the time of a product, GB/s of packed weight + x + y, their share of the bandwidth
that a copy reaches in the same run, and how many times faster than a bfloat16 product it is. Every
call of a timed chain multiplies by another copy of the weight, more of them than a cache holds, and
feeds the next call, so that nothing is skipped or overlapped.
"""

import argparse
import sys
import time
from collections.abc import Collection

import jax
import jax.numpy as jnp

from idp_jax.kernels.bench import cases
from idp_jax.kernels.bench.shapes import ROWS, SHAPES
from idp_jax.kernels.devices import best_backend, platform
from idp_jax.kernels.dispatch import arrangement_of

_CACHE_BYTES = 256 * 2**20
_REPEATS = 5


def seconds_per_call(multiply, x: jax.Array, weights: list, rounds: int = 4) -> float:
    """Median seconds of one product, over chains through all the weights."""

    @jax.jit
    def chain(x, weights):
        def one_round(_, x):
            for weight in weights:
                y = multiply(x, weight)
                # Depends on the product and stays finite; costs one pass over x.
                x = x + (y[:, :1] * jnp.asarray(1e-30, x.dtype))
            return x

        return jax.lax.fori_loop(0, rounds, one_round, x)

    jax.block_until_ready(chain(x, weights))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(chain(x, weights))
        times.append((time.perf_counter() - start) / (rounds * len(weights)))
    return sorted(times)[_REPEATS // 2]


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy."""
    size = 2**26 if platform() == "cpu" else 2**29  # more than a cache holds
    array = jnp.zeros(size, jnp.uint8)
    copy = jax.jit(lambda a: jax.lax.fori_loop(0, 20, lambda _, a: a + jnp.uint8(1), a))
    jax.block_until_ready(copy(array))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(copy(array))
        times.append(time.perf_counter() - start)
    return 20 * 2 * size / sorted(times)[_REPEATS // 2]


def copies(make, size: int) -> list:
    """Enough weights that a cache cannot hold them, at most 32."""
    count = max(2, min(32, -(-_CACHE_BYTES // size)))
    return [make(jax.random.key(k)) for k in range(count)]


def _kinds(bits: Collection[int | None]) -> list[cases.Kind]:
    quantised = ((2, 128), (3, -1), (3, 128), (4, 128), (8, 128))
    sparse = ((None, -1), (2, 128), (3, 128), (4, 128), (8, 128))
    kinds = [cases.Kind("quant", *case) for case in quantised]
    kinds += [cases.Kind("sparse24", *case) for case in sparse]
    return [kind for kind in kinds if kind.bits in bits]


def measure(
    backend: str,
    shape: tuple[int, int],
    rows: int,
    bandwidth: float,
    bits: Collection[int | None] = (None, 2, 3, 4, 8),
) -> tuple[list[str], int]:
    """Table rows of every kernel with these bits at one shape, and how many failed."""
    x = jax.random.normal(jax.random.key(9), (rows, shape[0]), jnp.bfloat16)
    dense = copies(
        lambda key: jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(shape[0] ** -0.5),
        2 * shape[0] * shape[1],
    )
    plain = lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)
    base = seconds_per_call(plain, x, dense)
    del dense
    place = f"{shape[0]} x {shape[1]} | {rows}"
    lines, failures = [f"| bf16 | {place} | {base * 1e6:.1f} | | | 1 |"], 0
    order = arrangement_of(backend)
    for kind in _kinds(bits):
        make = lambda key, kind=kind: cases.random_weight(key, kind, *shape, order)
        try:
            stored = cases.stored_bytes(make(jax.random.key(0)))
            multiply = cases.multiply(kind.operation, backend)
            seconds = seconds_per_call(multiply, x, copies(make, stored))
        except Exception as error:  # one kernel that fails hides no other
            failures += 1
            lines.append(f"| {kind.name} | {place} | {cases.first_line(error)} | | | |")
            continue
        rate = (stored + 2 * rows * sum(shape)) / seconds
        lines.append(
            f"| {kind.name} | {place} | {seconds * 1e6:.1f} "
            f"| {rate / 1e9:.0f} | {rate / bandwidth:.0%} | {base / seconds:.2f} |"
        )
    return lines, failures


def main() -> int:
    """Prints the table, and writes it where `--table` says; 1 if a kernel failed, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default=best_backend())
    parser.add_argument("--model", default="LLaMA-7B", choices=sorted(SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of x, with commas")
    parser.add_argument("--shape", help="one shape instead of a model's, as 4096x11008")
    parser.add_argument("--bits", default=cases.EVERY_BITS, help=cases.BITS_HELP)
    parser.add_argument("--table", help="write the table here too")
    arguments = parser.parse_args()
    shapes = SHAPES[arguments.model]
    if arguments.shape:
        inputs, outputs = map(int, arguments.shape.split("x"))
        shapes = ((inputs, outputs),)
    bandwidth, bits, failures = copy_bandwidth(), cases.parse_bits(arguments.bits), 0
    lines = [
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, backend {arguments.backend}, "
        f"copy {bandwidth / 1e9:.0f} GB/s",
        "",
        "| weights | I x O | M | us | GB/s | of copy | times bf16 |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for shape in shapes:
        for rows in map(int, arguments.rows.split(",")):
            new, failed = measure(arguments.backend, shape, rows, bandwidth, bits)
            print("\n".join(new), flush=True)
            lines, failures = lines + new, failures + failed
    if arguments.table:
        with open(arguments.table, "w") as file:
            file.write("\n".join(lines) + "\n")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
