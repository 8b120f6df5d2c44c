"""Lowers the Hopper kernels for an H100 on a machine without a GPU.

    pip install --no-deps jax-cuda13-pjrt==X jax-cuda13-plugin==X    # X: the version of jax
    python kernels/bench/lower_gpu.py

Layouts, shared memory and types are checked by Mosaic. Where CUDA's ptxas is found the kernels are
assembled too: MOSAIC_GPU_DUMP_PTXAS=1 and MOSAIC_GPU_DUMP_TO=DIR write registers and spills of each
to DIR. Values and speed are not checked.
"""

import argparse
import itertools
import math
import os
import re
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from idp_jax.kernels.bench import cases
from idp_jax.kernels.bench.shapes import all_shapes
from idp_jax.kernels.quant_matmul import mosaic_gpu as quant_gpu
from idp_jax.kernels.sparse24_matmul import mosaic_gpu as sparse_gpu
from idp_jax.kernels.targets import h100s


def lower(device, multiply, weight, rows: int, dtype):
    """Lowers one case."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    jitted = jax.jit(multiply, in_shardings=sharding, out_shardings=sharding)
    return jitted.lower(jax.ShapeDtypeStruct((rows, weight.inputs), dtype), weight)


def sliced_by_a_walk(device, multiply, weight) -> int:
    """The most elements that the compiled walk over eight layers [N, N] cuts out of an array."""
    walk, stack = cases.layer_walk(multiply, weight)
    program = lower(device, walk, stack, 1, jnp.bfloat16).compile().as_text() or ""
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* dynamic-slice\(", program)
    sizes = (math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)
    return max(sizes, default=0)


def main() -> int:
    """Prints a line per case; 1 if any failed, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one shape instead of all")
    arguments = parser.parse_args()
    device = h100s(1, 1)[0]
    failures = 0
    operations = {"quant": quant_gpu.quant_matmul, "sparse24": sparse_gpu.sparse24_matmul}
    kinds = cases.every_kind((-1, 32, 64, 128))
    shapes = all_shapes()[:1] if arguments.quick else all_shapes()
    for kind, shape, rows in itertools.product(kinds, shapes, (1, 16, 64, 200)):
        dtype = jnp.float32 if rows == 16 else jnp.bfloat16
        name = f"{kind.name}, {shape[0]} x {shape[1]}, {rows} rows, {dtype.__name__}"
        weight = cases.abstract_weight(kind, *shape, "fragments")
        try:
            lowered = lower(device, operations[kind.operation], weight, rows, dtype)
            lowered.compile()
            print(f"{name}: {len(lowered.as_text())} characters", flush=True)
        except Exception as error:
            failures += 1
            print(f"{name}: failed, {str(error).splitlines()[0]}", flush=True)
    for kind in kinds:
        weight = cases.abstract_weight(kind, 4096, 4096, "fragments")
        size = sliced_by_a_walk(device, operations[kind.operation], weight)
        failures += size > 1
        print(f"{kind.name}, a walk over layers: slices of {size} elements", flush=True)
    print(f"{failures} failed")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
