"""Compiles every TPU kernel with the real TPU compiler, without a TPU, and prints what it costs.

    python kernels/bench/compile_tpu.py --kinds v5e,v6e --table table.md

It needs `pip install libtpu` (the version that `jax[tpu]` asks for). "bytes" is what XLA's analysis
says the compiled program accesses (of a kernel, what it declares), over packed weight + x + y;
"walked" is what the blocks of the grid move between HBM and VMEM, over the same; VMEM is the scoped
memory of the largest kernel. A compiled kernel fits and uses what the hardware has; how fast it
runs is not known from this.
"""

import argparse
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend.core import Var

from idp_jax.kernels.bench import cases
from idp_jax.kernels.bench.shapes import ROWS, all_shapes
from idp_jax.kernels.quant_matmul import pallas_tpu as quant_tpu
from idp_jax.kernels.sparse24_matmul import pallas_tpu as sparse_tpu
from idp_jax.kernels.targets import tpus

TOPOLOGIES = {"v4": (2, 2, 1), "v5e": (2, 2), "v5p": (2, 2, 1), "v6e": (2, 2)}
BOUND = 1.15
"""Bytes accessed over packed weight + x + y may not exceed this."""


class Case(NamedTuple):
    """One kernel at one shape; `bits` is None for 2:4 with bfloat16 values."""

    operation: str
    bits: int | None
    group_size: int
    inputs: int
    outputs: int
    rows: int
    gradient: bool = False
    dtype: str = "bfloat16"


class Result(NamedTuple):
    """What compiling a case showed."""

    seconds: float
    bytes_ratio: float
    walked_ratio: float
    vmem: int


def _abstract_weight(case: Case) -> Any:
    kind = cases.Kind(case.operation, case.bits, case.group_size)
    return cases.abstract_weight(kind, case.inputs, case.outputs, "rows")


def program(case: Case):
    """The function to compile, of (x or the upstream gradient, weight)."""
    kernel = quant_tpu.quant_matmul if case.operation == "quant" else sparse_tpu.sparse24_matmul
    if not case.gradient:
        return kernel

    def gradient(upstream, weight):
        x = jnp.zeros((case.rows, case.inputs), case.dtype)
        return jax.vjp(lambda x: kernel(x, weight), x)[1](upstream)[0]

    return gradient


def compile_case(case: Case, kind: str) -> Result:
    """Compiles one case for one kind of TPU.

    Raises:
        Exception: whatever the compiler finds wrong.
    """
    weight = _abstract_weight(case)
    width = case.outputs if case.gradient else case.inputs
    x = jax.ShapeDtypeStruct((case.rows, width), case.dtype)
    walked = _walked(jax.make_jaxpr(program(case))(x, weight).jaxpr)
    start = time.perf_counter()
    compiled = _compile(program(case), kind, x, weight)
    seconds = time.perf_counter() - start
    ideal = _ideal_bytes(case, weight)
    scoped = re.findall(
        r'used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', compiled.as_text() or ""
    )
    cost: Any = compiled.cost_analysis()
    return Result(
        seconds,
        cost["bytes accessed"] / ideal,
        walked / ideal,
        max(map(int, scoped), default=0),
    )


def bytes_of_a_walk(case: Case, kind: str) -> float:
    """Bytes accessed for one of eight layers walked by `lax.scan`, over packed weight + x + y."""
    weight = _abstract_weight(case)
    walk, stack = cases.layer_walk(program(case), weight)
    x = jax.ShapeDtypeStruct((case.rows, case.inputs), case.dtype)
    # XLA counts the body of a loop once.
    cost: Any = _compile(walk, kind, x, stack).cost_analysis()
    return cost["bytes accessed"] / _ideal_bytes(case, weight)


def _compile(function, kind: str, *arguments):
    sharding = jax.sharding.SingleDeviceSharding(_device(kind))
    jitted = jax.jit(function, in_shardings=sharding, out_shardings=sharding)
    return jitted.lower(*arguments).compile()


def _ideal_bytes(case: Case, weight) -> int:
    activations = case.rows * (case.inputs + case.outputs) * jnp.dtype(case.dtype).itemsize
    return cases.stored_bytes(weight) + activations


def _walked(jaxpr) -> int:
    """Bytes that the blocks of all kernels in a program move: a block moves when its index does."""
    total = 0
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns") and equation.primitive.name != "pallas_call":
                total += _walked(inner)
        if equation.primitive.name == "pallas_call":
            total += _moved(equation.params["grid_mapping"])
    return total


def _moved(mapping) -> int:
    total = 0
    for block in mapping.block_mappings:
        index_map = block.index_map_jaxpr.jaxpr
        axes = {variable: axis for axis, variable in enumerate(index_map.invars)}
        last = max((axes.get(v, -1) for v in index_map.outvars if isinstance(v, Var)), default=-1)
        steps = math.prod(mapping.grid[: last + 1])
        kept = (size for size in block.block_shape if not isinstance(size, pl.Squeezed))
        sizes = [int(getattr(size, "block_size", size)) for size in kept]
        total += steps * math.prod(sizes) * block.array_aval.dtype.itemsize
    return total


def _device(kind: str):
    return tpus(kind, TOPOLOGIES[kind])[0]


def every_case(rows=ROWS, shapes=None) -> Iterator[Case]:
    """Every kernel at every shape; gradients where training has them."""
    kernels: list[tuple[str, int | None, int]] = [("quant", b, 128) for b in (2, 3, 4, 8)]
    kernels += [("quant", 3, -1), ("quant", 3, 64), ("quant", 4, 32)]
    kernels += [("sparse24", None, -1), ("sparse24", 4, 128)]
    for i, o in shapes or all_shapes():
        for name, bits, group in kernels:
            for m in rows:
                yield Case(name, bits, group, i, o, m)
                if m >= 512:
                    yield Case(name, bits, group, i, o, m, gradient=True)
    for name, bits, group in (("quant", 3, 128), ("sparse24", None, -1)):
        for m, gradient in ((1, False), (512, False), (512, True)):
            yield Case(name, bits, group, 4096, 11008, m, gradient, "float32")


def main() -> int:
    """Prints a table row per case; 1 if any failed or reads too many bytes, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", default=",".join(TOPOLOGIES), help="kinds of TPU, with commas")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of x, with commas")
    parser.add_argument("--table", help="write a Markdown table here")
    arguments = parser.parse_args()
    rows = [int(m) for m in arguments.rows.split(",")]
    lines = [
        "| TPU | kernel | bits | group | I x O | M | bytes | walked | VMEM MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    failures = 0
    for kind, case in itertools.product(arguments.kinds.split(","), every_case(rows)):
        name = f"{case.operation}{' gradient' if case.gradient else ''} {case.dtype}"
        head = f"| {kind} | {name} | {case.bits or 'bf16'} | {case.group_size} "
        head += f"| {case.inputs} x {case.outputs} | {case.rows} |"
        try:
            result = compile_case(case, kind)
        except Exception as error:
            failures += 1
            line = f"{head} failed: {str(error).splitlines()[0][:200]} | | |"
        else:
            failures += result.bytes_ratio > BOUND
            line = f"{head} {result.bytes_ratio:.3f} | {result.walked_ratio:.2f} | "
            line += f"{result.vmem / 2**20:.1f} |"
        lines.append(line)
        print(line, flush=True)
    if arguments.table:
        with open(arguments.table, "w") as file:
            file.write("\n".join(lines) + "\n")
    print(f"{len(lines) - 2} compiled, {failures} failed or above {BOUND}")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
