"""A training run: from a configuration to an adapter folder, or on from where it was interrupted.

The run's folder holds config.yaml (resolved), metrics.jsonl, checkpoints/, self_text.jsonl where
the model wrote its own text, and at the end adapter/ and result.json. A pool trains its prompts one
after the other, each in a folder below.
"""

import json
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
from idp_jax.jobs.files import contents, fingerprint, read_json, write_text
from idp_jax.jobs.folder import check_absent, check_writable, run_folder
from idp_jax.jobs.machine import describe
from idp_jax.jobs.progress import SILENT, Progress
from idp_jax.models.decoder import Decoder
from idp_jax.processes import first_process, gather, mesh_of
from idp_jax.recover.methods import METHODS, Adapter, parameter_count
from idp_jax.recover.selection import find_selector
from idp_jax.training.checkpoint import Checkpointer
from idp_jax.training.loop import fit
from idp_jax.training.metrics import JsonLines
from idp_jax.training.objectives import OBJECTIVES
from idp_jax.training.step import make_optimizer

_TOKEN_BYTES = 3  # of a token's text, at least in English


def train(config: Train, *, progress: Progress = SILENT) -> dict[str, Any]:
    """Trains what the configuration asks for.

    Returns:
        The contents of result.json: validation loss and perplexity, best step, extra parameters,
        tokens, device and versions.

    Raises:
        ConfigError: the folder holds a run with another configuration.
        ValueError: the model or the text cannot be used.
    """
    out = Path(config.out)
    mesh = mesh_of(config.mesh)
    with ExitStack() as held, jax.set_mesh(mesh) if mesh is not None else nullcontext():

        def begin() -> None:
            check_writable(out, _needed(config))
            held.enter_context(run_folder(out, config, inputs=_inputs(config)))

        first_process(begin, "claim")
        result = _finished(config, out)
        if result is not None:
            return result
        first_process(lambda: check_absent(out / "adapter", overwrite=True), "adapter's folder")
        return _train(config, out, mesh, progress)


def _inputs(config: Train) -> dict[str, dict[str, str]]:
    """The fingerprints of what a run reads."""
    read = {"model": str(formats.resolve(config.model)), "data.train": config.data.train}
    if config.data.validation is not None:
        read["data.validation"] = config.data.validation
    if config.data.train == SELF and config.data.teacher is not None:
        read["data.teacher"] = str(formats.resolve(config.data.teacher))
    return {name: fingerprint(path) for name, path in read.items()}


def _needed(config: Train) -> int:
    """Bytes that a run takes at least: of the text that it writes itself."""
    written = config.data.train == SELF and not (config.out / "self_text.jsonl").is_file()
    return config.tokens * _TOKEN_BYTES if written else 0


def _finished(config: Train, out: Path) -> dict[str, Any] | None:
    """What a finished run found, or None where there is still something to do.

    Raises:
        ConfigError: the result or its adapter is damaged, or another's.
    """
    file = out / "result.json"
    if not file.is_file():
        return None
    remedy = f"remove it, and the same command goes on from the last checkpoint in {out}"
    result = read_json(file, remedy)
    known, files = result.get("config"), result.get("adapter")
    ours = isinstance(known, dict) and known | {"out": None} == to_dict(config) | {"out": None}
    if not ours or not isinstance(files, dict):
        raise ConfigError(f"{file} is not what this run found; {remedy}")
    adapter = out / "adapter"
    if not adapter.exists():  # written again, from the last checkpoint
        return None
    found = {name: value for name, value in contents(adapter).items() if name in files}
    if found != files:
        wrong = next(name for name in files if found.get(name) != files[name])
        raise ConfigError(
            f"{adapter / wrong} is not as this run wrote it; remove {adapter}, and the same "
            "command writes it again"
        )
    return result


def _train(config: Train, out: Path, mesh, progress: Progress) -> dict[str, Any]:
    find_selector(config.selector)  # a wrong name is refused before anything is loaded
    decoder = formats.load_model(
        config.model,
        **config.held,
        use_sparse24=False,
        mesh=mesh,
        progress=progress.tracker("loading"),
    )
    tokenizer = formats.load_tokenizer(config.model)
    text = TrainingText.open(
        _source(config, out, decoder, tokenizer, progress),
        tokenizer,
        config.data.sequence_length,
        validation=config.data.validation,
        validation_windows=config.data.validation_windows,
        seed=config.seed,
    )
    method = METHODS[config.method]
    trained, summaries = [], []
    for number, run in enumerate(method.runs(config)):
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        start = run.init(decoder, key=key)
        with progress.bar(f"training {run.label}") as update:
            adapter, summary = _fit(config, start, decoder, text, out / run.folder, mesh, update)
        trained.append(adapter)
        summaries.append(summary)
    adapter = method.combine(config, trained)
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
        write_text(out / "result.json", json.dumps(result, indent=2))

    first_process(write, "result")
    return result


def _fit(config: Train, start: Adapter, decoder: Decoder, text, folder: Path, mesh, update):
    """One training with the parts that the configuration names; as `fit`."""
    with (
        closing(JsonLines(folder / "metrics.jsonl")) as metrics,
        Checkpointer(folder / "checkpoints") as checkpointer,
    ):
        return fit(
            start,
            decoder,
            partial(OBJECTIVES["next_token"], remat=config.remat),
            make_optimizer(config.optimizer, config.learning_rate, config.steps),
            text.batches(config.batch_size),
            text.validation_batches(config.batch_size),
            steps=config.steps,
            evaluate_every=config.evaluate_every,
            sinks=[metrics],
            checkpointer=checkpointer,
            mesh=mesh,
            progress=update,
        )


def _source(config: Train, out: Path, decoder: Decoder, tokenizer, progress: Progress) -> str:
    """The training source; text of the model's own is written once and then read like any other."""
    if config.data.train != SELF:
        return config.data.train
    file = out / "self_text.jsonl"
    if not file.is_file():
        teacher = decoder
        if config.data.teacher is not None:
            teacher = formats.load_model(config.data.teacher, **config.held)
        held_out = 0 if config.data.validation else config.data.validation_windows
        wanted = config.tokens + (held_out + 1) * config.data.sequence_length
        with progress.bar("sampling text from the model", "tokens") as update:
            texts = sample_documents(
                teacher,
                tokenizer,
                wanted,
                document_tokens=min(config.data.sequence_length, 512),
                seed=config.seed,
                progress=update,
            )
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        first_process(lambda: write_text(file, lines), "text")
    return str(file)
