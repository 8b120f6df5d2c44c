"""Sinks beside the files: what each writes, what it does when a run goes on, what is refused."""

import json
import struct
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from idp_jax.config import ConfigError, Train
from idp_jax.config.recovery import Tracking
from idp_jax.training import sinks as room
from idp_jax.training.sinks import TensorBoard, Tracker, check_sinks, make_sinks, where


def settings(tmp_path, *names) -> Train:
    return Train(model="m", out=tmp_path / "run", tracking=Tracking(sinks=names))


def records(folder: Path) -> list[bytes]:
    """What TFRecord files hold: length u64, its checksum u32, data, its checksum u32."""
    found = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(data[12 : 12 + size])
            data = data[16 + size :]
    return found


def test_tensorboard_reads_what_was_written_and_not_what_was_dropped(tmp_path):
    events = pytest.importorskip("tensorboardX.proto.event_pb2")
    with closing(TensorBoard(tmp_path)) as sink:
        sink.drop_after(-1)
        for step in range(4):
            sink.write(step, {"loss": float(step), "learning_rate": 0.5})
        assert len(records(tmp_path)) >= 4  # at once: a killed run loses none
        sink.drop_after(1)
        sink.write(2, {"loss": 7.0})
    found = [events.Event.FromString(record) for record in records(tmp_path)]
    starts = [event.step for event in found if event.HasField("session_log")]
    assert starts == [0, 2] and len(list(tmp_path.iterdir())) == 2
    shown = {}
    for event in found:  # as TensorBoard does: a start hides what is not before it
        if event.HasField("session_log"):
            shown = {key: value for key, value in shown.items() if key[1] < event.step}
        for value in event.summary.value:
            shown[value.tag, event.step] = value.simple_value
    assert {step: value for (tag, step), value in shown.items() if tag == "loss"} == {
        **{0: 0.0, 1: 1.0, 2: 7.0}
    }


def test_tensorboard_itself_agrees(tmp_path):
    pytest.importorskip("tensorboardX")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with closing(TensorBoard(tmp_path)) as sink:
        for step in range(4):
            sink.write(step, {"loss": float(step)})
        sink.drop_after(1)
        sink.write(2, {"loss": 7.0})
    found = reader.EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [
        *((0, 0.0), (1, 1.0), (2, 7.0))
    ]


class Fake:
    """A package with wandb's interface, as far as it is used."""

    def __init__(self):
        self.begun, self.rows, self.finished, self.axes = [], [], 0, []

    def init(self, **options):
        self.begun.append(options)
        finish = lambda: setattr(self, "finished", self.finished + 1)
        log = lambda values, step=None: self.rows.append((step, values))
        axes = lambda name, step_metric: self.axes.append((name, step_metric))
        return SimpleNamespace(log=log, finish=finish, define_metric=axes)


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_run_goes_on_under_its_identity(tmp_path, monkeypatch, package):
    fake = Fake()
    monkeypatch.setitem(sys.modules, package, fake)
    folder = tmp_path / "run"
    for step in range(2):
        with closing(Tracker(package, settings(tmp_path, package), folder, "run")) as sink:
            sink.drop_after(-1)
            assert len(fake.begun) == step  # nothing is opened before there is something to say
            sink.write(step, {"loss": 1.0, "bad": float("nan")})
    kept = json.loads((folder / "tracking.json").read_text())["id"]
    first, second = fake.begun
    assert first == second and first["resume"] == "allow" and first["project"] == "idp-jax"
    assert first["config"]["model"] == "m"
    assert kept in (first["id"] if package == "wandb" else first["name"])
    assert fake.finished == 2
    expected = {
        "wandb": [(None, {"step": step, "loss": 1.0}) for step in range(2)],
        "trackio": [(step, {"loss": 1.0}) for step in range(2)],
    }
    assert fake.rows == expected[package]
    assert fake.axes == ([("*", "step")] * 2 if package == "wandb" else [])


def test_one_that_cannot_start_says_so_in_a_line(tmp_path, monkeypatch):
    def init(**options):
        raise RuntimeError("no\nkey")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    sink = Tracker("wandb", settings(tmp_path, "wandb"), tmp_path / "run", "run")
    with pytest.raises(ConfigError, match="wandb cannot start: no key; WANDB_MODE=offline keeps"):
        sink.write(1, {"loss": 1.0})


def test_a_package_that_is_missing_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "trackio"):
        with pytest.raises(ConfigError, match=f"needs the package {name}: pip install {name}"):
            check_sinks(settings(tmp_path, name))
    config = settings(tmp_path, "tensorboard")
    check_sinks(config)  # is left out
    assert 'no TensorBoard (pip install "idp-jax[tracking]")' in where(config)
    assert f"{Path(config.out) / 'metrics.jsonl'}, " in where(config)
    assert "prompt_*/metrics.jsonl, " in where(replace(config, method="idp"))
    files = [Path(sink.path).name for sink in make_sinks(config, tmp_path / "run")]
    assert files == ["metrics.jsonl", "timing.jsonl"]


def test_sinks_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"--tracking\.sinks 'disk' is not one of tensorboard, "):
        settings(tmp_path, "disk")
    with pytest.raises(ConfigError, match=r"--tracking\.sinks names one twice: wandb wandb"):
        settings(tmp_path, "wandb", "wandb")


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_the_package_itself_takes_it(tmp_path, monkeypatch, package):
    """Offline, with the real package where it is installed."""
    pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    folder = tmp_path / "run"
    for step in range(2):
        with closing(Tracker(package, settings(tmp_path, package), folder, "run")) as sink:
            sink.write(step, {"loss": 1.0})
            sink.write(step, {"validation_loss": 2.0})
    assert json.loads((folder / "tracking.json").read_text())["id"]
