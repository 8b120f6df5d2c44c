"""A training run: from a configuration to an adapter folder, or on from where it was interrupted.

The run's folder holds config.yaml (resolved), metrics.jsonl, checkpoints/, self_text.jsonl where
the model wrote its own text, and at the end adapter/ and result.json. A pool trains its prompts one
after the other, each in a folder below.
"""

import json
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax

from idp_jax import formats
from idp_jax.config import Train
from idp_jax.config.files import to_dict
from idp_jax.data.self_text import sample_documents
from idp_jax.data.sources import SELF
from idp_jax.data.stream import TrainingText
from idp_jax.formats import save_adapter
from idp_jax.jobs.files import write_text
from idp_jax.jobs.folder import claim, release
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
    first_process(lambda: claim(out, config), "claim")
    done = out / "result.json"
    if done.is_file():
        return json.loads(done.read_text())
    try:
        with jax.set_mesh(mesh) if mesh is not None else nullcontext():
            return _train(config, out, mesh, progress)
    except ValueError:
        if jax.process_index() == 0:
            release(out)
        raise


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
        folder=out,
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
