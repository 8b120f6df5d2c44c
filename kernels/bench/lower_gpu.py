"""Lowers the Hopper kernels for an H100 on a machine without a GPU.

    pip install --no-deps jax-cuda13-pjrt==X jax-cuda13-plugin==X    # X: the version of jax
    python kernels/bench/lower_gpu.py

Layouts, shared memory and types are checked by Mosaic. Where CUDA's ptxas is found the kernels are
assembled too: MOSAIC_GPU_DUMP_PTXAS=1 and MOSAIC_GPU_DUMP_TO=DIR write registers and spills of each
to DIR. Values and speed are not checked.
"""

import argparse
import functools
import itertools
import math
import os
import re
import sys
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from idp_jax.kernels.bench.shapes import all_shapes
from idp_jax.kernels.quant_matmul import mosaic_gpu as quant_gpu
from idp_jax.kernels.quant_matmul.layout import repack
from idp_jax.kernels.sparse24_matmul import mosaic_gpu as sparse_gpu
from idp_jax.kernels.sparse24_matmul.layout import from_codes, from_dense
from idp_jax.kernels.stack import at
from jax.experimental import topologies

# Device facts of an H100 SXM, as XLA's GpuTargetConfig text proto.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def _checkpoint(bits: int, group_size: int, inputs: int, outputs: int):
    groups = 1 if group_size == -1 else inputs // group_size
    struct = jax.ShapeDtypeStruct
    return (
        struct((inputs * bits // 32, outputs), jnp.int32),
        struct((groups, outputs), jnp.float16),
        struct((groups, outputs), jnp.uint8),
    )


def quantised(bits: int, group_size: int, inputs: int, outputs: int):
    """A packed weight that has shapes and no values."""
    return jax.eval_shape(
        functools.partial(repack, bits=bits, arrangement="fragments"),
        *_checkpoint(bits, group_size, inputs, outputs),
    )


def sparse(inputs: int, outputs: int):
    """A 2:4 weight that has shapes and no values."""
    dense = jax.ShapeDtypeStruct((inputs, outputs), jnp.bfloat16)
    return jax.eval_shape(functools.partial(from_dense, arrangement="fragments"), dense)


def sparse_codes(bits: int, group_size: int, inputs: int, outputs: int):
    """A 2:4 weight of quantised values that has shapes and no values."""
    return jax.eval_shape(
        functools.partial(from_codes, bits=bits, arrangement="fragments"),
        *_checkpoint(bits, group_size, inputs, outputs),
    )


def lower(device, multiply, weight, rows: int, dtype):
    """Lowers one case."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    jitted = jax.jit(multiply, in_shardings=sharding, out_shardings=sharding)
    return jitted.lower(jax.ShapeDtypeStruct((rows, weight.inputs), dtype), weight)


def sliced_by_a_walk(device, multiply, weight) -> int:
    """The most elements that the compiled walk over eight layers [N, N] cuts out of an array."""
    stack = jax.tree.map(lambda a: jax.ShapeDtypeStruct((8, *a.shape), a.dtype), weight)

    def walk(x, stack):
        step = lambda x, layer: (multiply(x, at(stack, layer)), None)
        return jax.lax.scan(step, x, jnp.arange(8, dtype=jnp.int32))[0]

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
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
    )
    failures = 0
    kernels: list[tuple[str, Callable, Callable]] = [
        (
            f"{bits} bit, group {group}",
            quant_gpu.quant_matmul,
            functools.partial(quantised, bits, group),
        )
        for bits, group in itertools.product((2, 3, 4, 8), (-1, 32, 64, 128))
    ]
    kernels.append(("2:4", sparse_gpu.sparse24_matmul, sparse))
    kernels += [
        (
            f"2:4, {bits} bit, group {group}",
            sparse_gpu.sparse24_matmul,
            functools.partial(sparse_codes, bits, group),
        )
        for bits, group in itertools.product((2, 3, 4, 8), (-1, 32, 64, 128))
    ]
    shapes = all_shapes()[:1] if arguments.quick else all_shapes()
    for (kernel, multiply, make), (i, o) in itertools.product(kernels, shapes):
        for rows in (1, 16, 64, 200):
            dtype = jnp.float32 if rows == 16 else jnp.bfloat16
            name = f"{kernel}, {i} x {o}, {rows} rows, {dtype.__name__}"
            try:
                lowered = lower(topology.devices[0], multiply, make(i, o), rows, dtype)
                lowered.compile()
                print(f"{name}: {len(lowered.as_text())} characters", flush=True)
            except Exception as error:
                failures += 1
                print(f"{name}: failed, {str(error).splitlines()[0]}", flush=True)
    for kernel, multiply, make in kernels:
        size = sliced_by_a_walk(topology.devices[0], multiply, make(4096, 4096))
        failures += size > 1
        print(f"{kernel}, a walk over layers: slices of {size} elements", flush=True)
    print(f"{failures} failed")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
