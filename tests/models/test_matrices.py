"""The matrices of a block are known in one place."""

import ast
from pathlib import Path

import jax
import pytest

from idp_jax.models.matrices import matrices, matrix_axes, stages
from idp_jax.models.names import NAMES
from idp_jax.sharding import RULES
from tests.helpers import tiny_config, tiny_decoder

PACKAGE = Path(__file__).parents[2] / "idp_jax"
# The table, and the one that maps it to the names in files.
MAY_SPELL_THEM = {"models/matrices.py", "models/names.py"}
UNLIKE = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "hidden_dim": 64, "ffw_dim": 96}


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_sizes_biases_and_order_are_those_of_a_block(architecture):
    model = tiny_decoder(architecture, **UNLIKE, attention_bias=True, mlp_bias=False)
    found = [
        (name, weight.kernel.shape[1:], weight.bias is not None)
        for name in model.layers.weight_names
        for weight in [getattr(model.layers, name)]
    ]
    table = matrices(model.config)
    assert found == [(m.name, (m.inputs, m.outputs), m.bias) for m in table]
    assert {m.name for m in table if m.bias} == set("qkvo")
    # q, k, v, o and so on: 2 heads and 1 kv head of 16.
    assert [shape for _, shape, _ in found[:4]] == [(64, 32), (64, 16), (64, 16), (32, 64)]


def test_a_stage_reads_one_input():
    config = tiny_config("llama")
    grouped = [[m.name for m in stage] for stage in stages(config)]
    assert grouped == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    assert [m.stage for m in matrices(config)] == [0, 0, 0, 1, 2, 2, 3]
    for stage in stages(config):
        assert len({(m.inputs, m.axes[0]) for m in stage}) == 1


def test_tensor_parallelism_never_cuts_the_residual_stream():
    for matrix in matrices(tiny_config("llama")):
        side = 0 if matrix.split == "inputs" else 1
        assert RULES[matrix.axes[side]] == "model"
        assert matrix.axes[1 - side] == "embed"
        assert matrix_axes(matrix.name) == matrix.axes


@pytest.mark.parametrize("architecture", NAMES)
def test_every_matrix_has_a_name_in_files(architecture):
    table = matrices(tiny_config(architecture))
    assert set(NAMES[architecture].weights) == {matrix.name for matrix in table}


def test_no_other_file_spells_the_list():
    spelled = set()
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        if {"gate", "down"} <= strings or {"qkvo", "qkv"} & strings:
            spelled.add(str(file.relative_to(PACKAGE)))
    assert spelled == MAY_SPELL_THEM


def test_a_block_walks_in_the_order_of_the_table():
    """What runs: the order in which a forward pass multiplies by the matrices."""
    model = tiny_decoder("llama")
    block, seen = jax.tree.map(lambda x: x[0], model.layers), []

    class Recorder:
        def __init__(self, name):
            self.name, self.weight = name, getattr(block, name)

        def __call__(self, x):
            seen.append(self.name)
            return self.weight(x)

    for name in block.weight_names:
        object.__setattr__(block, name, Recorder(name))
    h, context, _ = model.start(model.embed(jax.numpy.ones((1, 3), "int32")))
    block(h, context)
    assert seen == list(block.weight_names)
