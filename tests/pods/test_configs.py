"""The files of configs/pods: every command line in them is one that plans and trains."""

import math
import shlex

import pytest

from benchmarks.plan_pods import ROOT, every_target, table_rows
from idp_jax.cli import parse
from idp_jax.config import Plan, Train
from idp_jax.pods.chips import CHIPS
from idp_jax.sharding import MESH_AXES
from idp_jax.training.checks import check_shapes

TARGETS = every_target()
TOPOLOGIES = {"v5e:16x16", "v5p:4x4x4", "v6e:4x4", "h100:8", "h100:1"}


def test_every_model_has_every_target():
    files = {target.file for target in TARGETS}
    assert {f"{target.file}, {target.topology}" for target in TARGETS} == {
        f"{file}, {topology}" for file in files for topology in TOPOLOGIES
    }
    assert len(TARGETS) == len(files) * len(TOPOLOGIES) == 20


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_command_line_can_be_planned(target, monkeypatch):
    monkeypatch.chdir(ROOT)
    train = parse(Train, ["--config_path", target.file, *target.options], "train")
    options = [*target.options, *target.model, "--topology", target.topology]
    planned = parse(Plan, [target.file, *options], "plan")
    assert (planned.batch_size, planned.mesh) == (train.batch_size, train.mesh)
    kind, _, shape = target.topology.partition(":")
    devices = math.prod(map(int, shape.split("x")))
    sizes = [getattr(train.mesh, axis) for axis in MESH_AXES]
    sizes = [s if s > 0 else devices // -math.prod(sizes) for s in sizes]
    assert kind in CHIPS and math.prod(sizes) == devices
    assert train.windows_at_once % (sizes[0] * sizes[1]) == 0
    assert check_shapes(planned, None) > 0


def test_the_trainings_of_a_file_are_the_same():
    """Mesh and passes change where and when windows are computed, not what is learnt."""
    free = {"--passes", "--mesh.data", "--mesh.fsdp", "--mesh.model"}
    for target in TARGETS:
        assert set(shlex.split(" ".join(target.options))[::2]) <= free


def test_a_row_says_what_does_not_fit():
    row = {"program": "step", "held": 2**30, "peak": 2**34, "memory": 2**33, "fits": False}
    row |= {"seconds": None, "mfu": None}
    known = {"target": "a, v5e:4x4", "error": "", "rows": [row]}
    assert table_rows(known) == [
        "| a, v5e:4x4 | step | 1.00 | **16.00, does not fit** | 8.00 |  |  |"
    ]
    known = {"target": "a", "error": "the compiler ends with -6: F0000", "rows": None}
    assert table_rows(known) == ["| a | the compiler ends with -6: F0000 | | | | | |"]
