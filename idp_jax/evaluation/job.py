"""`idp-jax eval`: a model is loaded once and measured with every selector that is asked for.

Whatever can be told without the model (tasks, texts, adapter, the place of the results) is looked
at before it is loaded. What has been scored is kept beside the results until these are written, so
that the same call goes on where it was stopped.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from idp_jax import formats
from idp_jax.config import ConfigError, Evaluate, Loading, Measurement, Scoring
from idp_jax.config.choices import Role
from idp_jax.config.files import to_dict
from idp_jax.data.text import read_text
from idp_jax.evaluation.journal import Journal
from idp_jax.evaluation.latency import latency
from idp_jax.evaluation.perplexity import perplexity, windows_from_text
from idp_jax.evaluation.results import (
    Results,
    TaskScores,
    VariantResult,
    is_results,
    write,
)
from idp_jax.formats.adapters import read_adapter
from idp_jax.formats.source import open_config
from idp_jax.jobs.files import fingerprint
from idp_jax.jobs.folder import check_writable
from idp_jax.jobs.lock import locked
from idp_jax.jobs.machine import describe
from idp_jax.jobs.progress import SILENT, Progress
from idp_jax.models.abstract import abstract
from idp_jax.models.config import from_hf
from idp_jax.models.decoder import Decoder
from idp_jax.processes import first_process, mesh_of
from idp_jax.recover import Pool, Repaired
from idp_jax.recover.methods import Adapter, parameter_count
from idp_jax.sharding import shard


def score(settings: Evaluate, *, progress: Progress = SILENT) -> Results:
    """Scores a model as the settings ask, and writes the results.

    Raises:
        ConfigError: settings that do not fit the model or its adapter.
        ValueError: the model, the adapter, a task or the text cannot be used.
    """
    with claimed(settings.out, settings.overwrite, settings.mesh, is_results) as mesh:
        settings = replace(settings, dtype=settings.dtype or formats.default_dtype())
        tokenizer = formats.load_tokenizer(settings.model)
        inputs = read_inputs(settings, tokenizer)
        adapter = _adapter(settings, inputs)
        journal = journal_of(settings, settings.out, [settings.adapter])
        variants = _variants(settings, adapter, tokenizer, inputs, mesh, progress, journal)
        results = Results(config=to_dict(settings), environment=describe(), variants=variants)
        first_process(lambda: write(results, settings.out), "results")
        journal.remove()
    return results


@contextmanager
def claimed(
    out: Path, overwrite: bool, arranged: Any, ours: Callable[[Path], bool]
) -> Iterator[jax.sharding.Mesh | None]:
    """Holds the place of a file of results, and the mesh that a `config.Mesh` asks for.

    Args:
        ours: whether a file that stands there may be replaced, given `overwrite`.

    Raises:
        ConfigError: something stands there that must not be replaced.
    """
    mesh = mesh_of(arranged)
    with ExitStack() as held, jax.set_mesh(mesh) if mesh is not None else nullcontext():

        def begin() -> None:
            check_writable(out)
            held.enter_context(locked(out))
            _check_replaceable(out, overwrite, ours)

        first_process(begin, "results: begin")
        yield mesh


def _check_replaceable(out: Path, overwrite: bool, ours: Callable[[Path], bool]) -> None:
    """Refuses a place for results where something stands that they must not replace."""
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; give a file such as results.json")
    if out.is_symlink():
        raise ConfigError(f"--out {out} is a link; give the file that it stands for")
    if not out.exists():
        return
    if not overwrite:
        raise ConfigError(f"{out} exists; give another --out, or --overwrite")
    if not ours(out):
        raise ConfigError(f"{out} holds no results, so it is not replaced; give another --out")


@dataclass(frozen=True)
class Inputs:
    """What a model is to be measured on.

    Attributes:
        windows: int32 [W, T] for the perplexity.
        tasks: the harness's, loaded.
    """

    windows: np.ndarray | None
    tasks: list[Any]


def read_inputs(settings: Scoring, tokenizer: Any) -> Inputs:
    """Reads text and tasks, for which no model is needed.

    Raises:
        ValueError: a task or the text cannot be used.
    """
    windows, tasks = None, []
    if settings.perplexity is not None:
        windows = windows_from_text(
            tokenizer, read_text(settings.perplexity), settings.sequence_length, settings.windows
        )
    if settings.task_names:
        from idp_jax.evaluation.task_data import local_tasks  # imports the harness, some seconds

        tasks = local_tasks(
            settings.task_names,
            settings.task_data,
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            include_path=settings.include_path,
        )
    return Inputs(windows, tasks)


def _adapter(settings: Evaluate, inputs: Inputs) -> Adapter | None:
    """The adapter, held with the inputs against the model's configuration alone.

    Raises:
        ConfigError: selectors are given for what is no pool, or --max-length for what has fewer
            positions.
        ValueError: it cannot be read or belongs to another model, or windows do not fit behind it.
    """
    model = abstract(from_hf(open_config(settings.model)))
    adapter = None if settings.adapter is None else read_adapter(model, settings.adapter)
    if settings.selector and not (isinstance(adapter, Pool) and len(adapter.lengths) > 1):
        raise ConfigError(
            f"--selector {settings.selector[0]} chooses among the prompts of a pool, which "
            f"{settings.adapter} is not"
        )
    for name in settings.selector:
        _pool(model, settings, name)
    repair = Repaired.of if adapter is None else adapter.repair
    prefix = jax.eval_shape(repair, model).prefix
    if inputs.windows is not None:
        model.check(inputs.windows, prefix)
    room = model.config.max_positions - (0 if prefix is None else prefix.length)
    if model.config.rope is None and (settings.max_length or 0) > room:
        raise ConfigError(
            f"--max-length {settings.max_length} exceeds the {room} learned positions that the "
            "model and its adapter leave to text"
        )
    return adapter


def journal_of(settings: Loading, out: Path, adapters: Sequence[Path | None]) -> Journal:
    """Of batches that are scored, beside the results; of this model, adapters and machine only."""
    file = out.with_name(f"{out.name}.scored.jsonl")
    folders = [formats.resolve(settings.model), *(path for path in adapters if path is not None)]
    folders += [part for folder in folders for part in sorted(folder.glob("*/"))]
    held = [settings.held, to_dict(settings.mesh), describe()]
    return Journal(file).within([fingerprint(folder) for folder in folders], held)


def code_of(selector: str | None) -> str:
    """The file that a selector is in, whose changes change scores; nothing for one of a package."""
    file, found, _ = (selector or "").partition(".py:")
    return Path(f"{file}.py").read_text() if found else ""


def _variants(
    settings: Evaluate,
    adapter: Adapter | None,
    tokenizer: Any,
    inputs: Inputs,
    mesh: jax.sharding.Mesh | None,
    progress: Progress,
    journal: Journal,
) -> list[VariantResult]:
    """One variant for each selector, or the one that the model and its adapter are."""
    model = formats.load_model(
        settings.model, **settings.held, mesh=mesh, progress=progress.tracker("loading")
    )
    repaired, name = Repaired.of(model), settings.model
    identity: dict[str, Any] = {"model": settings.model, "role": _role(settings)}
    if adapter is not None:
        repaired = shard(adapter, mesh).repair(model)
        name = f"{settings.model} + {settings.adapter}"
        identity["adapter"] = str(settings.adapter)
        identity["extra_parameters"] = parameter_count(adapter)
    found, own = [], getattr(getattr(adapter, "selector", None), "name", None)
    for selector in settings.selector or (None,):
        chosen = {} if selector is None else {"selector": selector}
        found.append(
            measure(
                repaired if selector is None else _chosen_by(selector, repaired, settings),
                tokenizer,
                settings,
                name=name if selector is None else f"{name}, {selector}",
                inputs=inputs,
                progress=progress,
                journal=journal.within(selector, code_of(selector or own)),
                **chosen,
                **identity,
            )
        )
    return found


def _chosen_by(name: str, repaired: Repaired, settings: Evaluate) -> Repaired:
    """The pool with another selector, whose parameters, if it has any, lie in the pool's folder."""
    return repaired.replace(selector=_pool(repaired.decoder, settings, name).selector)


def _pool(decoder: Decoder, settings: Evaluate, selector: str) -> Pool:
    """The settings' pool with a selector.

    Raises:
        ValueError: there is no such selector, or the folder does not hold its parameters.
    """
    assert settings.adapter is not None
    pool = read_adapter(decoder, settings.adapter, selector)
    assert isinstance(pool, Pool)
    return pool


def measure(
    repaired: Repaired,
    tokenizer: Any,
    settings: Measurement,
    *,
    inputs: Inputs | None = None,
    progress: Progress = SILENT,
    journal: Journal | None = None,
    **identity: Any,
) -> VariantResult:
    """Measures one variant.

    Args:
        tokenizer: a transformers tokenizer.
        inputs: those of the settings, where they are read already.
        journal: of batches that are known already.
        identity: what `VariantResult` says of it: name, role, model and the rest.

    Raises:
        ValueError: a task or the text cannot be used.
    """
    text, scores, times = None, TaskScores(), None
    inputs = inputs or read_inputs(settings, tokenizer)
    if inputs.windows is not None:
        track = progress.tracker("perplexity")
        found = perplexity(repaired, inputs.windows, settings.batch_size, track, journal)
        text = replace(found, file=str(settings.perplexity))
    if inputs.tasks:
        from idp_jax.evaluation.harness_files import HarnessFiles
        from idp_jax.evaluation.harness_tasks import evaluate  # imports the harness, some seconds

        said = {name: identity[name] for name in ("adapter", "selector") if name in identity}
        files = settings.log_samples and HarnessFiles(
            settings.log_samples, {"pretrained": identity["model"], **said}
        )
        scores = evaluate(
            repaired,
            tokenizer,
            tasks=inputs.tasks,
            limit=settings.limit,
            batch_size=settings.batch_size,
            num_fewshot=settings.num_fewshot,
            max_length=settings.max_length,
            gen_kwargs=settings.generation,
            files=files,
            seed=settings.seed,
            progress=progress,
            journal=journal,
        )
    if settings.latency:
        with progress.bar("latency") as update:
            update(0, 1)
            times = latency(repaired, **to_dict(settings.timing))
            update(1, 1)
    return VariantResult(
        **vars(scores),
        perplexity=text,
        latency=times,
        prompt_lengths=prompt_lengths(repaired),
        **identity,
    )


def prompt_lengths(repaired: Repaired) -> list[int]:
    """Tokens of each prompt that may stand in front of the input; none for a bare model."""
    if repaired.prefix is None:
        return []
    # Of layers that hold different slots, the longest: so far the input is moved on.
    return np.asarray(repaired.prefix.layer_masks()).any(0).sum(-1).tolist()


def _role(settings: Evaluate) -> Role:
    """A model that was compressed says so: it is packed, or has the report of our compression."""
    if settings.adapter is not None:
        return "repaired"
    source = formats.open_source(settings.model)
    compressed = source.quantization is not None
    return "compressed" if compressed or (source.path / "compression.json").is_file() else "dense"
