"""A training planned for devices that are not here."""

import dataclasses
import importlib.util

import jax
import pytest

from idp_jax.commands.plan import run
from idp_jax.config import ConfigError, Data, Lora, Mesh, Plan, Teacher
from idp_jax.jobs.chips import CHIPS
from idp_jax.pods import plan as pods
from idp_jax.pods.chips import Topology, open_topology
from idp_jax.pods.plan import plan
from idp_jax.pods.programs import Job
from idp_jax.training.plan import forward
from tests.helpers import tiny_folder

pytestmark = pytest.mark.usefixtures("optax_promotes")
WITH_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def _config(model, topology: str, **changes) -> Plan:
    settings = {
        "model": str(model),
        "topology": topology,
        "method": "lora",
        "lora": Lora(rank=4),
        "batch_size": 16,
        "tokens": 16 * 256 * 10,
        "data": Data(train="self", sequence_length=256, validation_windows=24),
        "dtype": "bfloat16",
        "remat": "layer",
        "bits": 3,
        "group_size": 64,
        "mesh": Mesh(data=-1),
    }
    return Plan(**settings | changes)


@pytest.fixture
def model(tmp_path):
    sizes = {"hidden_dim": 1024, "num_heads": 8, "num_kv_heads": 8, "ffw_dim": 2048}
    return tiny_folder(tmp_path / "model", "llama", **sizes, max_positions=2048)


@pytest.fixture
def here(monkeypatch):
    """The test's own eight devices as if they were not here."""
    chip = dataclasses.replace(CHIPS["v5e"], platform="cpu")
    topology = Topology("v5e:2x4", chip, (2, 4), jax.devices())
    monkeypatch.setattr(pods, "open_topology", lambda name: topology)
    return topology


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:0x4", "h100:", "v5e:2x2x2x2", "v5e:axb"])
def test_a_topology_that_is_none_is_named(name):
    with pytest.raises(ConfigError, match=r"is no kind and shape of v4, v5e, v5p, v6e, h100; give"):
        open_topology(name)


@pytest.mark.parametrize("name", ["v5e:4x4x4", "v5p:4x4", "h100:2x2x2"])
def test_a_torus_of_another_kind_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is no .*; give one such as v5e:16x16"):
        open_topology(name)


def test_every_program_is_compiled_and_counted(model, here):
    planned = plan(_config(model, "v5e:2x4", mesh=Mesh(data=2, fsdp=2, model=2)))
    reports = {report.name: report for report in planned.reports}
    assert list(reports) == ["step", "validation", "prefill", "decode"]  # of a CPU: no kernels
    step, validation = reports["step"], reports["validation"]
    assert step.fits(here) and step.peak >= step.held and step.tokens == 16 * 256
    assert step.counts.flops > validation.counts.flops > 0
    assert 0 < step.utilization(here) < 1 and step.bound(here) >= step.network(here) > 0
    # 24 windows on four shares of the batch, 12 at once.
    assert validation.tokens == 12 * 256


def test_validation_is_shared_by_all_devices(model, here):
    alone = plan(_config(model, "v5e:2x4", mesh=Mesh(data=8), programs="validation"))
    (report,) = alone.reports
    job = Job(_config(model, "v5e:2x4"), alone.mesh, "cpu")
    total = report.tokens / 256 * forward(job.model, 256)
    assert report.counts.flops == pytest.approx(total / 8, rel=0.05)


def test_a_teacher_stands_beside_the_step(model, here):
    mesh, teacher = Mesh(data=2, fsdp=2, model=2), Teacher(model=str(model))
    data = Data(train="self", sequence_length=256, validation_windows=10, documents="apart")
    alone = _config(model, "v5e:2x4", mesh=mesh, data=data, programs="step")
    beside = dataclasses.replace(alone, objective="kl", teacher=teacher)
    (without,), (step,) = (list(plan(config).reports) for config in (alone, beside))
    assert step.held > without.held and step.counts.flops > without.counts.flops
    every = dataclasses.replace(beside, programs="")
    job = Job(every, plan(every).mesh, "cpu")
    assert [p.name for p in job.programs()][:3] == ["step", "validation", "teacher"]


def test_a_pool_has_a_step_for_every_prompt(model, here):
    config = _config(model, "v5e:2x4", method="idp", pool_lengths=(3, 5), programs="step")
    names = [report.name for report in plan(config).reports]
    assert names == ["step of prompt of 3", "step of prompt of 5"]


@pytest.mark.parametrize(
    ("said", "needs"),
    [
        ("Used 18.25G of 15.75G hbm. Exceeded", "step needs at least 18.25 GiB of the 15.75 GiB"),
        ("memory required for HLO temporaries (46.48G) exceeds", "needs at least 46.48 GiB of the"),
        ("of another form", "step needs more of the 15.75 GiB"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_change(model, here, monkeypatch, said, needs):
    def refuse(job, adapter):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")

    monkeypatch.setattr(Job, "_step", refuse)
    with pytest.raises(
        ConfigError, match=f"{needs}.*; give --dtype bfloat16, --passes 2, a larger --mesh"
    ):
        run(_config(model, "v5e:2x4", programs="step", dtype="float32"))


def test_what_cannot_be_planned_is_refused(model, here):
    with pytest.raises(ConfigError, match="--batch-size 12 does not divide over .* 8 devices"):
        plan(_config(model, "v5e:2x4", batch_size=12))
    with pytest.raises(ConfigError, match="--programs steps begins none of step, validation"):
        plan(_config(model, "v5e:2x4", programs="steps"))
    with pytest.raises(ConfigError, match="the file's mesh is one device, and --topology v5e:2x4"):
        plan(_config(model, "v5e:2x4", mesh=Mesh()))
    with pytest.raises(ConfigError, match="--group-size 96 does not divide the 1024 inputs of q"):
        plan(_config(model, "v5e:2x4", group_size=96))
    with pytest.raises(ConfigError, match="--weights dense writes matrices out"):
        _config(model, "v5e:2x4", weights="dense")
    with pytest.raises(ValueError, match="nothing"):
        plan(_config(model, "v5e:2x4", method="idp", selector="nothing"))
    with pytest.raises(ConfigError, match="--objective 'foo'"):
        plan(_config(model, "v5e:2x4", objective="foo"))
    with pytest.raises(ValueError, match="does not use 8 devices"):
        plan(_config(model, "v5e:2x4", mesh=Mesh(data=3)))


@WITH_LIBTPU
def test_a_pod_of_sixteen(model):
    planned = plan(_config(model, "v5e:4x4", mesh=Mesh(data=4, fsdp=2, model=2)))
    reports = {report.name: report for report in planned.reports}
    assert {"step", "validation", "loading q", "loading down", "decode"} <= set(reports)
    assert all(report.fits(planned.topology) for report in reports.values())
    step = reports["step"]
    assert step.counts.flops > 0
    wide = [c for c in step.counts.collectives if c.shape == "bf16[2,256,1024]"]
    layers = 2
    assert sum(c.count for c in wide if c.kind == "all-reduce") <= 5 * layers
