"""A training run: from a configuration to an adapter folder, or on from where it was interrupted.

The run's folder holds config.yaml (resolved), metrics.jsonl, checkpoints/, self_text.jsonl and its
digest where the model wrote its own text, and at the end adapter/ and result.json. A pool trains
its prompts one after the other, each in a folder below.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax

from idp_jax import formats
from idp_jax.config import ConfigError, Train
from idp_jax.config.files import to_dict
from idp_jax.data.self_text import sample_documents
from idp_jax.data.sources import SELF
from idp_jax.data.stream import TrainingText
from idp_jax.formats import save_adapter
from idp_jax.jobs.files import contents, digest, read_json, write_json, write_text
from idp_jax.jobs.folder import check_absent, check_writable, run_folder
from idp_jax.jobs.machine import describe
from idp_jax.jobs.progress import SILENT, Progress, expecting
from idp_jax.models.decoder import Decoder
from idp_jax.processes import first_process, gather, mesh_of
from idp_jax.recover.methods import METHODS, Adapter, parameter_count
from idp_jax.recover.starts import Start
from idp_jax.training.checkpoint import Checkpointer
from idp_jax.training.checks import check, check_tokens
from idp_jax.training.clusters import part_of
from idp_jax.training.done import finished, inputs, needed
from idp_jax.training.loop import fit
from idp_jax.training.metrics import JsonLines
from idp_jax.training.objectives import OBJECTIVES
from idp_jax.training.step import make_optimizer

# What may change between two calls that work on the same run: it does not change what is trained.
_FREE = ("out", "mesh", "evaluate_every", "checkpoint_every")


def train(
    config: Train,
    *,
    progress: Progress = SILENT,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Trains what the configuration asks for.

    Args:
        say: told the budget before the work, and how long it will take after its first steps.

    Returns:
        The contents of result.json: validation loss and perplexity, best step, extra parameters,
        tokens, device and versions.

    Raises:
        ConfigError: the folder holds a run with another configuration.
        ValueError: the model or the text cannot be used, or training diverged.
    """
    out = Path(config.out)
    mesh = mesh_of(config.mesh)
    with ExitStack() as held, jax.set_mesh(mesh) if mesh is not None else nullcontext():
        parameters = check(config, mesh)
        conditions = _extensions(config)

        def begin() -> None:
            check_writable(out, needed(config))
            held.enter_context(run_folder(out, config, inputs=inputs(config), **conditions))

        first_process(begin, "claim")
        result = finished(config, conditions["free"])
        if result is not None:
            return result
        first_process(lambda: check_absent(out / "adapter", overwrite=True), "adapter's folder")
        return _train(config, out, mesh, parameters, progress, say)


def _extensions(config: Train) -> dict[str, Any]:
    """What may differ from the run in the folder, and why more tokens may not, as `claim` asks."""
    if config.data.train == SELF:
        return {"free": _FREE, "why": {"tokens": "a longer run is written another text"}}
    if config.optimizer.schedule == "linear":
        why = (
            "the learning rate falls over the whole budget; --optimizer.schedule constant does not"
        )
        return {"free": _FREE, "why": {"tokens": why}}
    return {"free": (*_FREE, "tokens")}


def _train(
    config: Train, out: Path, mesh, parameters: int, progress: Progress, say: Callable
) -> dict[str, Any]:
    tokenizer = formats.load_tokenizer(config.model)
    text = None
    if config.data.train != SELF:
        text = _text(config, out, str(config.data.train), tokenizer)
    method = METHODS[config.method]
    runs = method.runs(config)
    say(_budget(config, [run.label for run in runs], parameters))
    decoder = formats.load_model(
        config.model,
        **config.held,
        use_sparse24=False,
        mesh=mesh,
        progress=progress.tracker("loading"),
    )
    if text is None:
        source = _self_text(config, out, decoder, tokenizer, progress, say)
        text = _text(config, out, source, tokenizer)
    trained, summaries = [], []
    for number, run in enumerate(runs):
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        start = run.init(decoder, Start(key))
        with progress.bar(f"training {run.label}", "steps") as update:
            update = expecting(update, f"training {run.label}", "steps", say)
            folder = out / run.folder
            part = part_of(text, decoder, run.cluster, run.order)
            adapter, summary = _fit(config, start, decoder, part, folder, key, mesh, update)
        trained.append(adapter)
        summaries.append(summary)
    adapter = method.combine(config, trained, decoder, text.first)
    result = {
        "method": config.method,
        "extra_parameters": parameter_count(adapter),
        "training_tokens": config.steps
        * config.batch_size
        * config.data.sequence_length
        * len(trained),
        **(summaries[0] if len(summaries) == 1 else {"prompts": summaries}),
        "config": to_dict(config),
        "environment": describe(),
    }
    whole = gather(adapter)

    def write() -> None:
        save_adapter(whole, out / "adapter", decoder=decoder, base=config.model, overwrite=True)
        result["adapter"] = contents(out / "adapter")
        write_json(out / "result.json", result)

    first_process(write, "result")
    return result


def _budget(config: Train, labels: list[str], parameters: int) -> str:
    """What a run will train, on what: one line."""
    data, steps = config.data, config.steps
    window = config.batch_size * data.sequence_length
    each = " each" if len(labels) > 1 else ""
    writer = data.teacher or f"{config.model} itself"
    source = f"text that {writer} writes" if data.train == SELF else data.train
    return (
        f"training {' and '.join(labels)} ({parameters:,} parameters): {steps:,} steps of "
        f"{config.batch_size} x {data.sequence_length:,} tokens{each}, "
        f"{steps * window * len(labels):,} tokens in all, of {source}"
    )


def _text(config: Train, out: Path, source: str, tokenizer) -> TrainingText:
    text = TrainingText.open(
        source,
        tokenizer,
        config.data.sequence_length,
        validation=config.data.validation,
        validation_windows=config.data.validation_windows,
        seed=config.seed,
        folder=out,
    )
    check_tokens(config, text)
    return text


def _fit(config: Train, start: Adapter, decoder: Decoder, text, folder: Path, key, mesh, update):
    """One training with the parts that the configuration names; as `fit`."""
    with (
        closing(JsonLines(folder / "metrics.jsonl")) as metrics,
        Checkpointer(folder / "checkpoints") as checkpointer,
    ):
        return fit(
            start,
            decoder,
            partial(OBJECTIVES["ce"], remat=config.remat),
            make_optimizer(config.optimizer, config.learning_rate, config.steps),
            text.batches(config.batch_size),
            text.validation_batches(config.batch_size),
            steps=config.steps,
            evaluate_every=config.evaluate_every,
            checkpoint_every=config.checkpoint_every,
            sinks=[metrics],
            checkpointer=checkpointer,
            key=key,
            mesh=mesh,
            progress=update,
        )


def _self_text(
    config: Train, out: Path, decoder: Decoder, tokenizer, progress: Progress, say: Callable
) -> str:
    """Text of the model's own, written once into a file that is then read like any other."""
    file, kept = out / "self_text.jsonl", out / "self_text.partial.jsonl"
    written = out / "self_text.digest.json"
    remedy = f"remove {file}, and the same command writes it again"
    if file.is_file() and read_json(written, remedy).get(file.name) != digest(file):
        raise ConfigError(f"{file} is not as this run wrote it; {remedy}")
    if not file.is_file():
        teacher = decoder
        if config.data.teacher is not None:
            teacher = formats.load_model(config.data.teacher, **config.held)
        held_out = 0 if config.data.validation else config.data.validation_windows
        wanted = config.tokens + (held_out + 1) * config.data.sequence_length
        doing = "sampling text from the model"
        with progress.bar(doing, "tokens") as update:
            texts = sample_documents(
                teacher,
                tokenizer,
                wanted,
                document_tokens=min(config.data.sequence_length, 512),
                seed=config.seed,
                progress=expecting(update, doing, "tokens", say),
                kept=kept,
            )
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)

        def write() -> None:  # its digest first: a text without one is not this run's
            write_json(written, {file.name: hashlib.sha256(lines.encode()).hexdigest()})
            write_text(file, lines)

        first_process(write, "text")
    first_process(lambda: kept.unlink(missing_ok=True), "text: sampled")
    return str(file)
