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
from idp_jax.kernels.dispatch import arrangement_of
from idp_jax.kernels.quant_matmul import reference as quant_reference
from idp_jax.kernels.sparse24_matmul import reference as sparse_reference
from idp_jax.kernels.stack import select_layer

# bfloat16 keeps 8 bits, and the gradient's weights are rounded too; float32 sums differ in order.
TOLERANCE = {"bfloat16": 2**-7, "float32": 1e-5}


def case_error(kind: cases.Kind, weight, backend: str, rows: int, dtype: str) -> float:
    """Largest error of value and gradient for random x, each over the largest entry."""
    reference = quant_reference if kind.operation == "quant" else sparse_reference
    product = getattr(reference, f"{kind.operation}_matmul")
    multiply = cases.multiply(kind.operation, backend)
    x = jax.random.normal(jax.random.key(1), (rows, weight.inputs)).astype(dtype)
    upstream = jax.random.normal(jax.random.key(2), (rows, weight.outputs)).astype(dtype)
    # As a model has it: a layer of a stack.
    stack = jax.tree.map(lambda array: jnp.stack([jnp.zeros_like(array), array]), weight)
    y, pull_back = jax.vjp(lambda x: multiply(x, select_layer(stack, jnp.int32(1))), x)
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
    parser.add_argument("--kernels", default="quant,sparse24", help="with commas")
    parser.add_argument("--bits", default=cases.EVERY_BITS, help=cases.BITS_HELP)
    parser.add_argument("--inputs", type=int, default=1184)
    parser.add_argument("--outputs", type=int, default=200)
    arguments = parser.parse_args()
    order = arrangement_of(arguments.backend)
    # Fragments of 2:4 weights come in whole 64 outputs.
    whole = -(-arguments.outputs // 64) * 64
    kernels, bits = arguments.kernels.split(","), cases.parse_bits(arguments.bits)
    failures = 0
    print("| weights | rows of x | dtype | error |\n|---|---|---|---|", flush=True)
    for kind in cases.every_kind((-1, 32)):
        if kind.operation not in kernels or kind.bits not in bits:
            continue
        outputs = arguments.outputs if kind.operation == "quant" else whole
        weight = cases.random_weight(jax.random.key(0), kind, arguments.inputs, outputs, order)
        for rows, dtype in itertools.product((1, 16, 65, 300), TOLERANCE):
            try:
                error = case_error(kind, weight, arguments.backend, rows, dtype)
                said, fine = f"{error:.1e}", error <= TOLERANCE[dtype]
            except Exception as error:  # one kernel that fails hides no other
                said, fine = cases.first_line(error), False
            failures += not fine
            said = said if fine else f"**{said}**"
            print(f"| {kind.name} | {rows} | {dtype} | {said} |", flush=True)
    print(f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}: {failures} above tolerance")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
