"""`idp-jax compress`: from a checkpoint to a compressed checkpoint, with one block in memory.

A block is read, compressed, and written under its final name when it is complete. While the job
runs, everything lies in OUT.partial: `model/` grows into the result, the rest is what a job that
was killed needs to go on (its settings, the calibration tokens, a report for each block). The
invariant: a job that goes on ends with the same bits as one that was never stopped, because
finished blocks are read back and the text is taken through them by the same code.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from idp_jax import formats
from idp_jax.compression.driver import (
    StageTimes,
    compress_block,
    needs_data,
    resolve_settings,
    running,
)
from idp_jax.compression.flow import Flow, pass_through
from idp_jax.compression.plan import plan
from idp_jax.compression.report import draw
from idp_jax.config import Compress, Compression, ConfigError
from idp_jax.config.files import to_dict
from idp_jax.data.self_text import sample_documents
from idp_jax.data.sources import SELF, documents
from idp_jax.data.windows import take_windows
from idp_jax.formats import hf
from idp_jax.formats.quantization import Packing, write_config
from idp_jax.formats.source import open_source, part_of
from idp_jax.formats.write import write_settings
from idp_jax.jobs.files import (
    fingerprint,
    naming,
    read_json,
    write_file,
    write_json,
    write_text,
)
from idp_jax.jobs.folder import check_absent, check_writable, claim, put, recover, settled
from idp_jax.jobs.lock import locked
from idp_jax.jobs.machine import describe, peak_memory
from idp_jax.jobs.marker import mark
from idp_jax.jobs.progress import SILENT, Progress
from idp_jax.jobs.remote import local
from idp_jax.models.block import Block
from idp_jax.models.names import module_names
from idp_jax.processes import first_process, gather, mesh_of
from idp_jax.sharding import make_mesh, shard

# What may change between two calls that work on the same job.
_FREE = ("out", "overwrite", "plan", "allow_worse")
# What lies beside the model that grows; the last are of writes that were killed.
_WORK = ("config.yaml", "calibration.npy", "sampled.jsonl", "layer-*.json", ".*.partial-*")


class Job:
    """One compression job: its model, its settings matrix by matrix, and its folders.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigError: settings that do not fit the model.
    """

    def __init__(self, settings: Compress, mesh: jax.sharding.Mesh | None = None):
        if settings.out is None:
            raise ConfigError("--out is missing: give the folder of the compressed model")
        self.settings, self.mesh, self.out = settings, mesh, settled(settings.out)
        self.source = open_source(settings.model)
        if self.source.quantization is not None:
            raise ConfigError(f"{settings.model} is packed already; compress the original model")
        # Matrices keep the checkpoint's dtype until they are used.
        self.reader = hf.Reader(self.source, "auto")
        self.config = self.reader.config
        self.by_name = resolve_settings(self.config, settings, settings.form)
        if needs_data(self.by_name) and settings.sequence_length > self.config.max_positions:
            raise ConfigError(
                f"--sequence-length {settings.sequence_length} exceeds the model's "
                f"{self.config.max_positions} positions"
            )
        self.quantization = _announced(settings, self.by_name, module_names(self.config))
        self.folder = self.out.with_name(self.out.name + ".partial")
        self.model = self.folder / "model"

    def start(self) -> int:
        """Claims the job's folder; returns how many blocks an earlier call has finished there.

        Raises:
            ConfigError: the folder holds a job with other settings, another model or another text,
                or the disk has no room for the result.
            ValueError: `out` stands and may not be replaced.
        """

        def prepare() -> None:
            claimed = (self.folder / "config.yaml").is_file()
            if self.out.exists() and claimed and not self.model.exists():
                self._discard()  # killed between the last rename and the clearing up
            recover(self.out)
            check_absent(self.out, overwrite=self.settings.overwrite)
            inputs = {"model": fingerprint(self.source.path)}
            if needs_data(self.by_name):
                inputs["calibration"] = fingerprint(local(self.settings.calibration))
            written = sum(file.stat().st_size for file in self.model.glob("*.safetensors"))
            wanted = plan(self.config, self.settings, self.by_name).disk
            check_writable(self.out, max(wanted - written, 0))
            claim(self.folder, self.settings, free=_FREE, inputs=inputs)
            self.model.mkdir(exist_ok=True)

        first_process(prepare, "compress: start")
        return self.finished_blocks

    @property
    def finished_blocks(self) -> int:
        """How many blocks are written."""
        return sum(self._shard(layer).is_file() for layer in range(self.config.num_layers))

    def prepare(self, times: StageTimes, *, progress: Progress = SILENT) -> None:
        """Gathers the calibration text.

        Raises:
            ValueError: there is too little of it.
        """
        if needs_data(self.by_name):
            with times.measure("calibration text"):
                self._tokens(progress)

    def run(self, times: StageTimes, *, progress: Progress = SILENT) -> list[dict[str, Any]]:
        """Compresses what is not yet compressed; returns the report, a row for every matrix.

        Raises:
            CompressionError: see `driver.compress_block`; what was finished before stays.
        """
        flow = None
        if needs_data(self.by_name):
            with times.measure("forward"):
                outer = hf.Reader(self.source, self.settings.dtype).without_layers()
                flow = Flow(outer, self._tokens(), self.settings.batch_size, self.mesh)
                del outer
        for layer in progress.track(
            range(self.config.num_layers), f"compressing ({self.settings.method})"
        ):
            if self._shard(layer).is_file():
                with times.measure("forward"):
                    if flow is not None:
                        pass_through(flow, self._finished(layer, flow.dtype))
                continue
            started = time.perf_counter()
            # Nothing here keeps the block as it was read: each matrix goes when it is compressed.
            block, rows = compress_block(
                self._loaded(layer, times), layer, self.by_name, self.settings, flow, times
            )
            seconds = time.perf_counter() - started
            with times.measure("save"):
                self._write(layer, block, {"seconds": seconds, "matrices": rows})
        remedy = f"remove {self.folder}, and start again"
        layers = range(self.config.num_layers)
        reports = (read_json(self._report(layer), remedy) for layer in layers)
        return [row for report in reports for row in report["matrices"]]

    def withdraw(self) -> None:
        """Gives the folder up if no block is finished: a job that cannot start leaves nothing."""
        if not self.finished_blocks:
            shutil.rmtree(self.model, ignore_errors=True)
            self._discard()

    def finish(self, report: dict[str, Any]) -> None:
        """Writes what is not a block, and gives the folder its name."""

        def write() -> None:
            outer = self.reader.without_layers()
            dtype = np.asarray(outer.embedding[...]).dtype
            write_file(self._file(0), lambda path: _save(hf.outer_tensors(outer), path))
            self._write_index()
            write_settings(self.model, self.settings.model, self.quantization, dtype)
            write_json(self.model / "compression.json", report)
            title = f"{self.settings.model}: {self.settings.method}"
            if any("relative_error" in row for row in report["matrices"]):
                picture = lambda path: draw(report["matrices"], title, path)
                write_file(self.model / "compression.png", picture)
            mark(self.model)
            check_absent(self.out, overwrite=self.settings.overwrite)
            put(self.model, self.out)
            self._discard()

        with naming(self.out):
            first_process(write, "compress: finish")

    def _discard(self) -> None:
        """Removes what the work needed, unless there is a file of somebody else's among it."""
        files = {file for pattern in _WORK for file in self.folder.glob(pattern)}
        if files == set(self.folder.iterdir()):
            for file in files:
                file.unlink()
            self.folder.rmdir()

    def _tokens(self, progress: Progress = SILENT) -> np.ndarray:
        """int32 [samples, T]; kept in the folder, so that a job that goes on reads the same."""
        file, kept = self.folder / "calibration.npy", self.folder / "sampled.jsonl"

        def write() -> None:
            if not file.is_file():
                found = calibration_tokens(self.settings, progress=progress, kept=kept)
                tokens = np.asarray(found, np.int32)
                write_file(file, lambda path: _save_array(path, tokens))
            kept.unlink(missing_ok=True)

        # Asked inside: other processes may look for the file when it is already there.
        first_process(write, "compress: calibration")
        try:
            return np.load(file)
        except (ValueError, EOFError) as error:
            raise ConfigError(
                f"{file} is damaged ({error}); remove {self.folder}, and start again"
            ) from error

    def _file(self, number: int) -> Path:
        count = self.config.num_layers + 1
        return self.model / f"model-{number + 1:05d}-of-{count:05d}.safetensors"

    def _shard(self, layer: int) -> Path:
        return self._file(layer + 1)

    def _report(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.json"

    def _loaded(self, layer: int, times: StageTimes) -> Block:
        with times.measure("load"):
            return jax.block_until_ready(shard(self.reader.block(layer), self.mesh))

    def _finished(self, layer: int, dtype: str) -> Block:
        """A finished block as the calibration pass runs it."""
        source = part_of(self.source, self._shard(layer), self.quantization)
        block = shard(hf.Reader(source, "auto").block(layer), self.mesh)
        return block.replace(**{n: running(getattr(block, n), dtype) for n in block.weight_names})

    def _write(self, layer: int, block: Block, report: dict[str, Any]) -> None:
        """Writes a block's report, then its tensors, whose file says that the block is finished."""
        block = jax.tree.map(np.asarray, gather(block))

        def write() -> None:
            write_text(self._report(layer), json.dumps(report))
            tensors = hf.block_tensors(self.config, layer, block, self.settings.form)
            write_file(self._shard(layer), lambda path: _save(tensors, path))

        first_process(write, f"compress: layer {layer}")

    def _write_index(self) -> None:
        from safetensors import safe_open

        places, size = {}, 0
        for number in range(self.config.num_layers + 1):
            file = self._file(number)
            size += file.stat().st_size
            with safe_open(file, "np") as handle:
                places |= dict.fromkeys(handle.keys(), file.name)
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_text(self.model / "model.safetensors.index.json", json.dumps(index, indent=2))


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # given a name, numpy would end it in ".npy"
        np.save(file, array)


def _save(tensors: Iterator[tuple[str, np.ndarray]], path: Path) -> None:
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors}
    save_file(contiguous, path, metadata={"format": "pt"})


def _announced(
    settings: Compress,
    by_name: dict[tuple[int, str], Compression | None],
    modules: dict[tuple[int, str], str],
) -> dict[str, Any] | None:
    """The `quantization_config` of the result."""
    packings = {
        modules[key]: None
        if chosen is None or not chosen.quantizes
        else Packing(chosen.bits, chosen.group_size, chosen.symmetric)
        for key, chosen in by_name.items()
    }
    return write_config(settings.form, packings, damping=settings.damping)


def compress(
    settings: Compress,
    *,
    progress: Progress = SILENT,
    begin: Callable[[Job, int], None] = lambda job, finished: None,
) -> dict[str, Any]:
    """Compresses a model into a folder.

    Args:
        begin: called with the job and the number of blocks that an earlier call has finished, when
            the text is there and the first block is next.

    Returns:
        The report, which is also `compression.json` in the folder.

    Raises:
        ValueError: settings that do not fit the model, too little calibration text, or a folder
            that exists or holds another job.
    """
    times, mesh = StageTimes(), mesh_of(settings.mesh)
    with ExitStack() as held, jax.set_mesh(mesh) if mesh is not None else nullcontext():
        job = Job(settings, mesh)
        first_process(lambda: held.enter_context(locked(job.out)), "compress: lock")
        finished = job.start()
        try:
            job.prepare(times, progress=progress)
            begin(job, finished)
            rows = job.run(times, progress=progress)
        except (ValueError, OSError):
            job.withdraw()
            raise
        report = {
            "config": to_dict(settings),
            "environment": describe(),
            "matrices": rows,
            "seconds": dict(times.seconds),
            "peak_memory": peak_memory(),
        }
        job.finish(report)
    return report


def calibration_tokens(
    settings: Compress, *, progress: Progress = SILENT, kept: Path | None = None
) -> np.ndarray:
    """The calibration windows that the settings ask for, int [samples, T].

    Args:
        kept: a file for text of the model's own, see `sample_documents`.

    Raises:
        ValueError: there is too little text.
    """
    tokenizer = formats.load_tokenizer(settings.model)
    length, count = settings.sequence_length, settings.samples
    if settings.calibration == SELF:
        # One process samples while the others wait: on a device of its own, not on their mesh.
        local = make_mesh({}, jax.local_devices()[:1])
        with jax.set_mesh(local), progress.bar("sampling calibration text", "tokens") as update:
            texts = sample_documents(
                formats.load_model(settings.model, dtype=settings.dtype),
                tokenizer,
                (count + 1) * length,
                document_tokens=min(length, 512),
                seed=settings.seed,
                progress=update,
                kept=kept,
            )
        return take_windows(iter(texts), tokenizer, length, count, "the model's own text")
    shuffle = settings.order == "random"
    texts = documents(settings.calibration, seed=settings.seed, shuffle=shuffle)
    return take_windows(texts, tokenizer, length, count, settings.calibration)
