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
from jax.experimental import topologies

from idp_jax.kernels.bench import cases
from idp_jax.kernels.bench.shapes import all_shapes
from idp_jax.kernels.quant_matmul import mosaic_gpu as quant_gpu
from idp_jax.kernels.sparse24_matmul import mosaic_gpu as sparse_gpu

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
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
    )
    failures = 0
    operations = {"quant": quant_gpu.quant_matmul, "sparse24": sparse_gpu.sparse24_matmul}
    kinds = cases.every_kind((-1, 32, 64, 128))
    shapes = all_shapes()[:1] if arguments.quick else all_shapes()
    for kind, shape, rows in itertools.product(kinds, shapes, (1, 16, 64, 200)):
        dtype = jnp.float32 if rows == 16 else jnp.bfloat16
        name = f"{kind.name}, {shape[0]} x {shape[1]}, {rows} rows, {dtype.__name__}"
        weight = cases.abstract_weight(kind, *shape, "fragments")
        try:
            lowered = lower(topology.devices[0], operations[kind.operation], weight, rows, dtype)
            lowered.compile()
            print(f"{name}: {len(lowered.as_text())} characters", flush=True)
        except Exception as error:
            failures += 1
            print(f"{name}: failed, {str(error).splitlines()[0]}", flush=True)
    for kind in kinds:
        weight = cases.abstract_weight(kind, 4096, 4096, "fragments")
        size = sliced_by_a_walk(topology.devices[0], operations[kind.operation], weight)
        failures += size > 1
        print(f"{kind.name}, a walk over layers: slices of {size} elements", flush=True)
    print(f"{failures} failed")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
