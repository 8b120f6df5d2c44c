"""Values and gradients of the kernels on the accelerator of this machine, against float64.

    python kernels/bench/check_gpu.py                  # mosaic_gpu on a Hopper GPU
    python kernels/bench/check_gpu.py --backend pallas_tpu

Prints the largest error over the largest entry for each case; exits with 1 above the tolerance.
"""

import argparse
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from idp_jax.kernels.bench import cases
from idp_jax.kernels.quant_matmul import reference as quant_reference
from idp_jax.kernels.sparse24_matmul import reference as sparse_reference
from idp_jax.kernels.stack import at

# bfloat16 keeps 8 bits, and the gradient's weights are rounded too; float32 sums differ in order.
TOLERANCE = {"bfloat16": 2**-7, "float32": 1e-5}


def worst_error(multiply, reference, product, x, upstream, weight) -> float:
    """Largest error of value and gradient, each over the largest entry."""
    # As a model has it: a layer of a stack.
    stack = jax.tree.map(lambda array: jnp.stack([jnp.zeros_like(array), array]), weight)
    y, pull_back = jax.vjp(lambda x: multiply(x, at(stack, jnp.int32(1))), x)
    (gradient,) = pull_back(upstream)
    pairs = ((y, product(x, weight)), (gradient, reference.gradient(upstream, weight)))
    return max(
        float(np.abs(np.asarray(ours, np.float64) - exact).max() / np.abs(exact).max())
        for ours, exact in pairs
    )


def main() -> int:
    """Prints a line per case; 1 if any is above its tolerance, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="mosaic_gpu")
    parser.add_argument("--inputs", type=int, default=1184)
    parser.add_argument("--outputs", type=int, default=200)
    arguments = parser.parse_args()
    shape = (arguments.inputs, arguments.outputs)
    key = jax.random.key(0)
    order = cases.arrangement_of(arguments.backend)
    weights = [
        (f"{bits} bit, group {group}", "quant", cases.quantised(key, bits, group, *shape, order))
        for bits, group in itertools.product((2, 3, 4, 8), (-1, 32))
    ]
    # Fragments of 2:4 weights come in whole 64 outputs.
    whole = (shape[0], -(-shape[1] // 64) * 64)
    weights.append(("2:4", "sparse24", cases.sparse(key, *whole, order)))
    weights += [
        (
            f"2:4, {bits} bit, group {group}",
            "sparse24",
            cases.sparse_codes(key, bits, group, *whole, order),
        )
        for bits, group in itertools.product((2, 3, 4, 8), (-1, 32))
    ]
    failures = 0
    for (name, kernel, weight), rows, dtype in itertools.product(
        weights, (1, 16, 65, 300), TOLERANCE
    ):
        x = jax.random.normal(jax.random.key(1), (rows, weight.inputs)).astype(dtype)
        upstream = jax.random.normal(jax.random.key(2), (rows, weight.outputs)).astype(dtype)
        reference = quant_reference if kernel == "quant" else sparse_reference
        product = getattr(reference, f"{kernel}_matmul")
        multiply = cases.multiply(kernel, arguments.backend)
        error = worst_error(multiply, reference, product, x, upstream, weight)
        failures += not error <= TOLERANCE[dtype]
        print(f"{name}, {rows} rows, {jnp.dtype(dtype).name}: {error:.1e}", flush=True)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {failures} above tolerance")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
