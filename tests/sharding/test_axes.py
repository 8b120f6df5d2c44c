"""Axes are declared by the classes that hold parameters; what nobody declares is not cut."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from idp_jax.models import KV
from idp_jax.models.abstract import Storage, abstract
from idp_jax.recover import (
    LoraAdapter,
    MaskedLora,
    NormsAndBiases,
    Pool,
    PrefixAdapter,
    Repaired,
    SoftPrompt,
)
from idp_jax.sharding import MESH_AXES, declared_axes, make_mesh, shardings
from tests.helpers import tiny_config

PACKAGE = Path(__file__).parents[2] / "idp_jax"
MESH = {"data": 2, "fsdp": 2, "model": 2}
KEY = jax.random.key(0)
LLAMA, OPT = tiny_config("llama", num_kv_heads=4), tiny_config("opt", embedding_dim=32)
ALL = ("q", "k", "v", "o", "up")
ADAPTERS = {
    "prompt": lambda model: SoftPrompt.init(model, 8, KEY),
    "prefix": lambda model: PrefixAdapter.init(model, 8, KEY),
    "lora": lambda model: LoraAdapter.init(model, 4, KEY, targets=ALL),
    "masked": lambda model: MaskedLora.init(model, 4, KEY, rules=("layers.0 rank=2",)),
    "norms": lambda model: NormsAndBiases.init(model, biases="all"),
    "pool": lambda model: Pool([SoftPrompt.init(model, n, KEY) for n in (4, 8)]),
}


class Router(nnx.Module):
    """Parameters that are called like the MLP's, and say nothing of their axes."""

    def __init__(self):
        self.up = nnx.Param(jnp.ones((64, 96), "float32"))
        self.down = nnx.Param(jnp.ones((96, 64), "float32"))


def keys_and_values():
    stored = jnp.ones((2, 4, 8, 2, 16), "float32")
    return KV(stored, stored, jnp.ones((4, 8), bool), jnp.ones((4,), "int32"))


def with_everything(model):
    """A model with biases of a LoRA and a head of its own, neither of which it had."""
    lora = LoraAdapter.init(model, 4, KEY, targets=ALL)
    bias = {"q": jnp.zeros((2, 64), "float32")}
    head = {"head.kernel": jnp.zeros((64, 128), "float32")}
    lora = LoraAdapter(dict(lora.a), dict(lora.b), 1.0, bias=bias, replaced=head)
    return lora.repair(model).decoder


def adapter(name, config=LLAMA):
    return jax.eval_shape(ADAPTERS[name], abstract(config))


KINDS = {
    "llama": lambda: abstract(LLAMA),
    "opt": lambda: abstract(OPT),
    "biases": lambda: abstract(tiny_config("llama", attention_bias=True, mlp_bias=True)),
    "packed": lambda: abstract(OPT, weights=Storage(4, 32)),
    "act-order": lambda: abstract(LLAMA, weights=Storage(4, 32, act_order=True)),
    "tpu": lambda: abstract(OPT, weights=Storage(3, 32, act_order=True, backend="pallas_tpu")),
    "gpu": lambda: abstract(LLAMA, weights=Storage(3, -1, backend="mosaic_gpu")),
    "sparse24": lambda: abstract(OPT, weights=Storage(sparse24=True, backend="pallas_tpu")),
    "with-lora": lambda: jax.eval_shape(
        lambda lora, model: lora.repair(model).decoder, adapter("lora"), abstract(LLAMA)
    ),
    "with-everything": lambda: jax.eval_shape(
        with_everything, abstract(tiny_config("llama", tied_embeddings=True))
    ),
    "kv": keys_and_values,
    "repaired": lambda: Repaired(abstract(LLAMA), keys_and_values()),
    **{name: (lambda name=name: adapter(name)) for name in ADAPTERS},
    "optimiser": lambda: jax.eval_shape(optax.adam(1e-3).init, adapter("lora")),
    "router": Router,
}
# A parameter that no class declares is whole on every device: slow, never wrong. Who adds one here
# says so on purpose.
UNDECLARED = {
    "router": {".up.value", ".down.value"},
    "optimiser": {"[0].count"},
}


def names(tree) -> dict[str, tuple | None]:
    """The declared axes of every parameter, by its path."""
    return {jax.tree_util.keystr(path): axes for path, _, axes in declared_axes(tree)}


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_without_declared_axes(kind):
    found = names(KINDS[kind]())
    assert {path for path, axes in found.items() if axes is None} == UNDECLARED.get(kind, set())


@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_has_a_sharding(kind):
    tree = KINDS[kind]()
    placed = shardings(tree, make_mesh(MESH))
    assert jax.tree.structure(placed) == jax.tree.structure(tree)
    for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True):
        assert len(place.spec) <= leaf.ndim
        place.shard_shape(leaf.shape)  # raises where a part is not whole


def specs(tree) -> dict[str, P]:
    """Where every parameter goes on a mesh of 2 x 2 x 2, by its path."""
    leaves = jax.tree_util.tree_flatten_with_path(shardings(tree, make_mesh(MESH)))[0]
    return {jax.tree_util.keystr(path): place.spec for path, place in leaves}


def test_adapters_are_cut_like_the_matrices_beside_them():
    lora = specs(adapter("lora"))
    assert lora[".a.q.value"] == P(None, "fsdp", None)
    assert lora[".b.q.value"] == P(None, None, "model")
    assert lora[".a.o.value"] == P(None, "model", None)
    assert lora[".b.o.value"] == P(None, None, "fsdp")
    prefix = specs(adapter("prefix"))
    assert prefix[".k.value"] == prefix[".v.value"] == P(None, None, "model", None)
    assert set(specs(adapter("pool")).values()) == {P(None, None)}


def test_keys_and_values_are_cut_by_rows_and_heads():
    found = specs(keys_and_values())
    assert found[".k"] == found[".v"] == P(None, ("data", "fsdp"), None, "model", None)
    assert found[".mask"] == P(("data", "fsdp"), None)


@pytest.mark.parametrize("name", ADAPTERS)
def test_optimiser_states_are_cut_like_their_adapter(name):
    state = jax.eval_shape(optax.adamw(1e-3).init, adapter(name))
    mesh = make_mesh(MESH)
    moments, expected = shardings(state[0].mu, mesh), shardings(adapter(name), mesh)
    assert jax.tree.leaves(moments) == jax.tree.leaves(expected)
    assert shardings(state, mesh)[0].count.spec == P()


def test_a_router_is_not_taken_for_the_mlp():
    """By itself, and inside a module that knows matrices of the same names."""
    assert set(specs(Router()).values()) == {P(None, None)}
    model = abstract(LLAMA)
    model.layers.router = nnx.data(Router())
    found = specs(model)
    assert found[".layers.router.up.value"] == found[".layers.router.down.value"] == P(None, None)
    assert found[".layers.up.kernel.value"] == P(None, "fsdp", "model")


def test_matrices_in_a_kernel_s_layout_are_cut_on_both_sides():
    config = tiny_config("llama", hidden_dim=1024, num_heads=8, num_kv_heads=8, ffw_dim=1024)
    found = specs(abstract(config, weights=Storage(4, 128, backend="pallas_tpu")))
    for side, name in ((P(None, "fsdp", "model"), "q"), (P(None, "model", "fsdp"), "o")):
        assert found[f".layers.{name}.packed.value.words"] == side
        assert found[f".layers.{name}.packed.value.grid"] == side
    fragments = specs(abstract(config, weights=Storage(4, 128, backend="mosaic_gpu")))
    assert fragments[".layers.q.packed.value.words"] == P(None, "model", "fsdp", None)


class MeshAxes(ast.NodeVisitor):
    """Collects where a file names a mesh axis."""

    def __init__(self):
        self.lines: list[int] = []

    def _look(self, node: ast.AST, words) -> None:
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and part.value in words:
                self.lines.append(part.lineno)

    def visit_Constant(self, node):
        self._look(node, {"fsdp"})  # the other two are common words too

    def visit_Attribute(self, node):
        if node.attr == "fsdp":
            self.lines.append(node.lineno)
        self.generic_visit(node)

    def visit_Subscript(self, node):
        if isinstance(node.value, ast.Attribute) and node.value.attr == "shape":
            self._look(node.slice, MESH_AXES)
        self.generic_visit(node)

    def visit_Call(self, node):
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in ("PartitionSpec", "P", "psum", "axis_index", "make_mesh"):
            self._look(node, MESH_AXES)
        for keyword in node.keywords:
            if keyword.arg in ("axis", "axis_name", "batch", "mesh"):
                self._look(keyword.value, MESH_AXES)
        self.generic_visit(node)


def test_mesh_axes_are_named_in_one_file():
    """Beside sharding.py only the settings that users write name them."""
    for file in PACKAGE.rglob("*.py"):
        looker = MeshAxes()
        looker.visit(ast.parse(file.read_text()))
        place = str(file.relative_to(PACKAGE))
        if place != "sharding.py" and not place.startswith("config/"):
            assert not looker.lines, f"{place} names a mesh axis in lines {looker.lines}"
