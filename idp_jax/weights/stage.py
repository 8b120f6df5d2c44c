"""The products of one input with several matrices, on a mesh: a stage of a block.

A kernel is opaque to the partitioner, and of a dense product the partitioner reduces the gradient
of the input once for each matrix. So on a mesh a stage is one `jax.shard_map`, forward and back,
whose messages are written out here: what is cut over `fsdp` is gathered as it is stored (packed
words stay packed), the parts of a product over `model` are summed once, and so is the gradient of
the input, however many matrices read it. The invariant: results and gradients are those of one
device, but for the order of sums over devices.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from idp_jax.kernels.stack import slice_layer
from idp_jax.sharding import STORAGE_AXIS, TENSOR_AXIS, named_axes, spec
from idp_jax.weights.dense import add_bias
from idp_jax.weights.repacked import is_compressed


class _Plan(NamedTuple):
    """How a stage is cut; hashable, because a differentiated function carries it.

    Attributes:
        mesh: what it runs on.
        x: partition of the input.
        y: partition of each result.
        weights: partition of every array, in the order of the leaves.
        cut: whether each matrix is cut over TENSOR_AXIS; the others are whole on every device.
        split: which side is cut, "outputs" or "inputs"; of the latter parts are summed.
    """

    mesh: Any
    x: PartitionSpec
    y: tuple[PartitionSpec, ...]
    weights: tuple[PartitionSpec, ...]
    cut: tuple[bool, ...]
    split: str

    @property
    def varying(self) -> set[str]:
        """The mesh axes along which devices compute different things."""
        return {axis for part in (self.x, *self.y) for axis in _axes_of(part)}


def products(
    x: jax.Array, weights: Sequence[Any], axes: Sequence[tuple[str, str]]
) -> list[jax.Array]:
    """What each of the weights, which all read x, gives for it.

    Args:
        x: [B, ..., I].
        weights: modules of `idp_jax.weights`, of one layer.
        axes: what inputs and outputs of each mean, see `models.matrices`; one side is `embed`, the
            same of all.

    Returns:
        [B, ..., O] each, in the dtype of x.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return [weight(x) for weight in weights]
    split = "outputs" if axes[0][0] == "embed" else "inputs"
    biases = [weight.bias for weight in weights]
    bare = [weight.without_bias() for weight in weights]
    if split == "inputs":  # an input may move to another device's part: here x is whole
        (weight,) = bare
        x, weight = weight.in_order(x)
        bare = [weight]
    if mesh.shape[STORAGE_AXIS] > 1:  # what is gathered is copied anyway: one layer is enough
        slices = lambda node: slice_layer(node) if is_compressed(node) else node
        bare = jax.tree.map(slices, bare, is_leaf=is_compressed)
    plan, parts = _planned(mesh, x, bare, axes, split)
    found: Any = _products(plan, x, parts)
    return [add_bias(y, bias) for y, bias in zip(found, biases, strict=True)]


def _planned(
    mesh, x: jax.Array, weights: list, axes: Sequence[tuple[str, str]], split: str
) -> tuple[_Plan, tuple]:
    """How a stage is cut, and its weights as a device sees them."""
    batch, middle = spec(("batch",), x.shape[:1], mesh)[0], (None,) * (x.ndim - 2)
    whole, cut = (PartitionSpec(batch, *middle, axis) for axis in (None, TENSOR_AXIS))
    count = mesh.shape[TENSOR_AXIS]
    is_cut = tuple(count > 1 and weight.divides(split, count) for weight in weights)
    partitions = [
        part
        for weight, names, here in zip(weights, axes, is_cut, strict=True)
        for part in _partition(weight, names, here, mesh)
    ]
    results = tuple(cut if here and split == "outputs" else whole for here in is_cut)
    x_part = cut if split == "inputs" and is_cut[0] else whole
    parts = tuple(
        weight.part(split, count) if here else weight
        for weight, here in zip(weights, is_cut, strict=True)
    )
    return _Plan(mesh, x_part, results, tuple(partitions), is_cut, split), parts


def _partition(weight, names: tuple[str, str], is_cut: bool, mesh) -> list[PartitionSpec]:
    """How the arrays of a weight come to a device."""
    keep = lambda axis: axis if axis != TENSOR_AXIS or is_cut else None
    return [
        PartitionSpec(*map(keep, spec(meant or (None,) * leaf.ndim, leaf.shape, mesh)))
        for _, leaf, meant in named_axes(weight, weight.logical_axes(*names))
    ]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(plan: _Plan, x: jax.Array, weights: tuple) -> tuple[jax.Array, ...]:
    leaves, tree = jax.tree.flatten(weights)

    def local(x: jax.Array, *leaves: jax.Array) -> tuple[jax.Array, ...]:
        found = _each(x, jax.tree.unflatten(tree, _gathered(plan, leaves)))
        summed = plan.split == "inputs" and plan.cut[0]
        return tuple(jax.lax.psum(y, TENSOR_AXIS) for y in found) if summed else found

    return _on_mesh(plan, local, (plan.x, *plan.weights), plan.y)(x, *leaves)


def _forward(plan: _Plan, x: Any, weights: tuple):
    # Which arrays are trained is kept as structure: an empty tuple for each of those.
    trained = tuple(() if leaf.perturbed else None for leaf in jax.tree.leaves(weights))
    x, weights = jax.tree.map(lambda leaf: leaf.value, (x, weights))
    return _products(plan, x, weights), (x, weights, trained)


def _backward(plan: _Plan, kept: tuple, upstream: tuple):
    x, weights, flags = kept
    leaves, tree = jax.tree.flatten(weights)
    trained = [number for number, flag in enumerate(flags) if flag is not None]
    upstream = tuple(map(_made, upstream))
    count = plan.mesh.shape[TENSOR_AXIS] if any(plan.cut) else 1

    def local(x: jax.Array, upstream: tuple, *leaves: jax.Array):
        whole = _gathered(plan, leaves)

        def give(x: jax.Array, learnt: list[jax.Array]):
            here = dict(enumerate(whole)) | dict(zip(trained, learnt, strict=True))
            return _each(x, jax.tree.unflatten(tree, list(here.values())))

        # What every device computes alike is to count once in the sum over them.
        shares = tuple(
            y if cut else y / jnp.asarray(count, y.dtype)
            for y, cut in zip(upstream, plan.cut, strict=True)
        )
        pull_back = jax.vjp(give, x, [whole[n] for n in trained])[1]
        slope, learnt = pull_back(shares)
        parts = [plan.weights[n] for n in trained]
        return _summed(plan, plan.x, slope), *map(partial(_summed, plan), parts, learnt)

    places = (plan.x, plan.y, *plan.weights), (plan.x, *(plan.weights[n] for n in trained))
    slope, *learnt = _on_mesh(plan, local, *places)(x, upstream, *leaves)
    found = dict(zip(trained, learnt, strict=True))
    return slope, jax.tree.unflatten(tree, [found.get(n) for n in range(len(leaves))])


_products.defvjp(_forward, _backward, symbolic_zeros=True)


def _made(y: Any) -> jax.Array:
    """A gradient as an array, where it may be a zero that nobody has made."""
    return y if isinstance(y, jax.Array) else jnp.zeros(y.shape, y.dtype)


def _each(x: jax.Array, weights: tuple) -> tuple[jax.Array, ...]:
    return tuple(weight(x) for weight in weights)


def _on_mesh(plan: _Plan, local, inputs: tuple, outputs: tuple):
    # The sums are written out: none is to be derived.
    return jax.shard_map(local, mesh=plan.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def _gathered(plan: _Plan, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays with what STORAGE_AXIS cuts made whole."""
    whole = []
    for leaf, part in zip(leaves, plan.weights, strict=True):
        for axis in _storage_axes(part):
            leaf = jax.lax.all_gather(leaf, STORAGE_AXIS, axis=axis, tiled=True)
        whole.append(leaf)
    return whole


def _summed(plan: _Plan, part: PartitionSpec, slope: jax.Array) -> jax.Array:
    """A gradient summed over the devices that had a share in it, cut like what it is of."""
    varying = {axis for part in (plan.x, *plan.y) for axis in _axes_of(part)}
    storage = [] if part is plan.x else _storage_axes(part)
    over = varying - _axes_of(part)
    slope = jax.lax.psum(slope, tuple(sorted(over))) if over else slope
    for axis in storage:
        if STORAGE_AXIS in varying:
            slope = jax.lax.psum_scatter(slope, STORAGE_AXIS, scatter_dimension=axis, tiled=True)
        else:
            size = slope.shape[axis] // plan.mesh.shape[STORAGE_AXIS]
            first = jax.lax.axis_index(STORAGE_AXIS) * size
            slope = jax.lax.dynamic_slice_in_dim(slope, first, size, axis)
    return slope


def _storage_axes(part: PartitionSpec) -> list[int]:
    return [axis for axis, name in enumerate(part) if name == STORAGE_AXIS]


def _axes_of(part: PartitionSpec) -> set[str]:
    names = (axis if isinstance(axis, tuple) else (axis,) for axis in part)
    return {name for axes in names for name in axes if name is not None}
