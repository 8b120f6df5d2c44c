"""The product with a packed weight on Hopper GPUs, few rows of x at a time.

Invariant: codes become weights in registers only; see gpu_blocks.py for the walk. A word of the
"fragments" arrangement already is where it is needed: its two halves become two neighbouring
bfloat16 of an operand with one shift and one mask (see `codes.pairs_of_field`). Subtracting the
zero from such a value is exact; the float32 sums of a group are scaled. Many rows and the gradient
expand the weight in XLA.
"""

import functools

import jax

from .. import dispatch, gpu_blocks
from ..codes import TILE
from ..frozen import checked
from ..stack import as_stack
from . import xla
from .layout import KernelWeight


def unsupported(x: jax.Array, weight: KernelWeight) -> str | None:
    """Why this kernel cannot serve, or None if it can."""
    reason = dispatch.unsupported(x, weight, backend="mosaic_gpu", span=TILE)
    if reason is None and (weight.inputs % 8 or weight.outputs % 8):
        return f"{weight.inputs} x {weight.outputs} are no multiples of 8"
    return reason


def quant_matmul(x: jax.Array, weight: KernelWeight, *, interpret=None) -> jax.Array:
    """x [M, I] times the weight: [M, O] of x's dtype. Differentiable in x; `order` is the caller's.

    Args:
        x: bfloat16 or float32 [M, I], in the order of the words.
        weight: see layout.py, arranged as "fragments".
        interpret: `plgpu`'s interpreter parameters, for tests.

    Raises:
        ValueError: what `unsupported` says.
    """
    return _product(x, weight, interpret)


def _value(x: jax.Array, weight: KernelWeight, interpret) -> jax.Array:
    chunk = gpu_blocks.chunk_of(weight.groups, weight.group_size)
    stack, layer = as_stack(weight)
    return gpu_blocks.product(
        x,
        [
            gpu_blocks.words_operand(stack.words, weight.bits),
            gpu_blocks.grid_operand(stack.grid, weight.groups, weight.group_size, TILE),
        ],
        functools.partial(
            gpu_blocks.add_coded_tile,
            bits=weight.bits,
            scale_dtype=weight.scale_dtype,
            chunk=chunk,
            interpreted=interpret is not None,
        ),
        outputs=weight.outputs,
        layer=layer,
        bits=weight.bits,
        chunk=chunk,
        interpret=interpret,
    )


_product = checked(gpu_blocks.few_rows_product(_value, xla.multiply), unsupported)
