"""Where a run's numbers go beside its files: TensorBoard, wandb, trackio.

The invariant: nothing is imported, opened or sent before the first number is written, so that a
sink costs nothing on processes that write none. A run that goes on finds its place by an identity
kept in its folder. What each can take back: TensorBoard hides the later steps; wandb and trackio
keep what they have, and a run that goes on writes the same numbers of the same steps once more.
"""

import contextlib
import importlib
import importlib.util
import math
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from idp_jax.config import ConfigError, Train
from idp_jax.config.files import to_dict
from idp_jax.jobs.files import read_json, write_json
from idp_jax.training.metrics import JsonLines, Sink

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_IDENTITY = "tracking.json"


def installed(sink: str) -> bool:
    """Whether the package that a sink needs is there; it is not imported."""
    return importlib.util.find_spec(_PACKAGES[sink]) is not None


def check_sinks(config: Train) -> None:
    """Refuses a sink that was asked for and is not installed; TensorBoard is then left out."""
    for name in config.tracking.sinks:
        if name != "tensorboard" and not installed(name):
            raise ConfigError(
                f"--tracking.sinks {name} needs the package {name}: pip install {_PACKAGES[name]}"
            )


def where(config: Train) -> str:
    """One line for people: where the numbers of a run go."""
    out, others = Path(config.out), []
    for name in config.tracking.sinks:
        if name != "tensorboard":
            others.append(f"{name} (project {config.tracking.project})")
        elif installed(name):
            others.append(f"TensorBoard (tensorboard --logdir {out})")
        else:
            others.append('no TensorBoard (pip install "idp-jax[tracking]")')
    apart = config.method == "idp" and config.pool.training != "joint"
    file = out / ("prompt_*" if apart else "") / "metrics.jsonl"
    return f"numbers of every step: {', '.join([str(file), *others])}"


def make_sinks(config: Train, folder: Path) -> list[Sink]:
    """The sinks of one training, whose folder is the job's or one below it."""
    name = Path(config.out).name + (f"/{folder.name}" if folder != Path(config.out) else "")
    made: list[Sink] = [
        JsonLines(folder / "metrics.jsonl"),
        JsonLines(folder / "timing.jsonl", timings=True),
    ]
    for sink in config.tracking.sinks:
        if sink != "tensorboard":
            made.append(Tracker(sink, config, folder, name))
        elif installed(sink):
            made.append(TensorBoard(folder / "tensorboard"))
    return made


class TensorBoard:
    """Event files, written at once: tensorboardX's writer without its thread and its queue."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._file: Any = None
        self._kept: int | None = None  # the last step that counts, of an earlier file

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one event, which is in the file when this returns."""
        if self._file is None:
            self._file = self._open()
        scalars = [{"tag": name, "simple_value": x} for name, x in values.items()]
        self._add(step=step, summary={"value": scalars})

    def drop_after(self, step: int) -> None:
        """Has TensorBoard hide later steps of earlier files: the next file says so in front."""
        self.close()
        self._kept = step

    def close(self) -> None:
        """Closes the file; another `write` begins another one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> Any:
        writer = importlib.import_module("tensorboardX.event_file_writer")
        self._folder.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names; two may begin within a second.
        self._file = writer.EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
        if self._kept is not None:
            self._add(step=self._kept + 1, file_version="brain.Event:2")
            self._add(step=self._kept + 1, session_log={"status": 1})  # SessionLog.START
        return self._file

    def _add(self, **event: Any) -> None:
        events = importlib.import_module("tensorboardX.proto.event_pb2")
        messages = {"summary": _summary, "session_log": events.SessionLog}
        made = {key: messages[key](**x) if key in messages else x for key, x in event.items()}
        self._file.write_event(events.Event(wall_time=time.time(), **made))
        self._file.flush()


def _summary(value: list[dict[str, Any]]) -> Any:
    messages = importlib.import_module("tensorboardX.proto.summary_pb2")
    return messages.Summary(value=[messages.Summary.Value(**entry) for entry in value])


class Tracker:
    """wandb, or trackio, which has the same interface: a run goes on under its own identity.

    wandb takes its mode from the environment (WANDB_MODE=offline keeps all on this disk).
    """

    def __init__(self, package: str, config: Train, folder: Path, name: str):
        self._package, self._config = package, config
        self._folder, self._name = folder, name
        self._run: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends one row; numbers that are not finite are left out."""
        if self._run is None:
            self._run = self._begin()
        plain = {name: x for name, x in values.items() if math.isfinite(x)}
        if self._package == "wandb":  # refuses a step behind its last: the step is a number, too
            self._run.log({"step": step, **plain})
        else:
            self._run.log(plain, step=step)

    def drop_after(self, step: int) -> None:
        """Nothing: what was sent stays, and is sent again with the same numbers."""

    def close(self) -> None:
        """Ends the run, which waits until all is sent."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _begin(self) -> Any:
        module = importlib.import_module(self._package)
        common = {
            "project": self._config.tracking.project,
            "config": to_dict(self._config),
            "resume": "allow",
        }
        identity = self._identity()
        try:
            if self._package != "wandb":
                # Known by its name alone. It greets on standard output, which is not its own.
                with contextlib.redirect_stdout(None):
                    return module.init(name=f"{self._name}-{identity}", embed=False, **common)
            self._folder.mkdir(parents=True, exist_ok=True)
            run = module.init(name=self._name, id=identity, dir=self._folder, **common)
            run.define_metric("*", step_metric="step")
            return run
        except Exception as error:
            said = " ".join(str(error).split())[:200] or type(error).__name__
            offline = "; WANDB_MODE=offline keeps the run on this disk"
            raise ConfigError(
                f"--tracking.sinks {self._package} cannot start: {said}"
                f"{offline if self._package == 'wandb' else ''}"
            ) from error

    def _identity(self) -> str:
        file = self._folder / _IDENTITY
        if not file.is_file():
            write_json(file, {"id": secrets.token_hex(4)})
        return str(read_json(file, f"remove {file}, and a new run is begun there").get("id"))
