"""What is refused before a run has cost anything: settings that the model cannot take."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from idp_jax.config import ConfigError, Train
from idp_jax.data.batch import Batch
from idp_jax.data.sources import HUB, SELF
from idp_jax.data.stream import TrainingText
from idp_jax.formats.source import open_config
from idp_jax.jobs.remote import local
from idp_jax.models.abstract import abstract
from idp_jax.models.config import from_hf
from idp_jax.models.decoder import Decoder
from idp_jax.recover.methods import METHODS, Adapter, Run, parameter_count
from idp_jax.recover.pool import Pool
from idp_jax.recover.selection import check_selector, find_selector
from idp_jax.sharding import batch_parts
from idp_jax.training.sinks import check_sinks
from idp_jax.training.starts import abstract_start, resolved
from idp_jax.training.teacher import check_teacher


def check(config: Train, mesh: jax.sharding.Mesh | None) -> int:
    """`check_shapes` of a run that is to be made here, and what it reads and writes."""
    check_sinks(config)
    _check_sources(config)
    return check_shapes(config, mesh)


def check_shapes(config: Train, mesh: jax.sharding.Mesh | None) -> int:
    """Tries a run on the model's shapes alone.

    Returns:
        The number of parameters that it would train.

    Raises:
        ValueError: a selector, teacher, size or mesh that cannot be used.
    """
    check_selector(config.selector, joint=config.pool.training == "joint")
    check_teacher(config)
    check_batch(config, mesh)
    decoder = abstract(from_hf(open_config(config.model)))
    runs = METHODS[config.method].runs(resolved(config))
    adapters = [abstract_adapter(config, run, decoder) for run in runs]
    for adapter in adapters:
        check_positions(adapter, decoder, config.data.sequence_length)
    if config.method == "idp":
        _check_choice(config, adapters, decoder)
    return sum(parameter_count(adapter) for adapter in adapters)


def check_batch(config: Train, mesh: jax.sharding.Mesh | None) -> None:
    """Refuses a batch whose passes do not divide over the devices of a mesh."""
    rows = batch_parts(mesh)
    if config.windows_at_once % rows:
        each = "" if config.passes == 1 else f" in {config.passes} passes"
        raise ConfigError(
            f"--batch-size {config.batch_size}{each} does not divide over the mesh's data x fsdp = "
            f"{rows} devices; choose a multiple of {rows * config.passes}"
        )


def _check_choice(config: Train, adapters: list[Adapter], decoder: Decoder) -> None:
    """Tries the selector on a window's shape: one that fails would do so behind the training."""
    ids = jax.ShapeDtypeStruct((1, config.data.sequence_length), jnp.int32)

    def score(adapters: list[Any], decoder: Decoder, ids: jax.Array):
        start = (decoder, len(adapters), jax.random.key(config.seed))
        joint = config.pool.training == "joint"
        pool = adapters[0] if joint else Pool(adapters, find_selector(config.selector, start))
        return pool.repair(decoder).scores(ids)

    try:
        jax.eval_shape(score, adapters, decoder, ids)
    except ValueError:  # says what is wrong, and of which selector
        raise
    except Exception as error:  # whatever a user's file raises
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ConfigError(f"--selector {config.selector} fails on an input: {reason}") from error


def abstract_adapter(config: Train, run: Run, decoder: Decoder) -> Adapter:
    """The shapes of a training's start; raises ValueError where the model cannot take it."""
    return jax.eval_shape(run.init, decoder, abstract_start(config, run))


def check_windows(adapter: Adapter, decoder: Decoder, windows: Sequence[Batch]) -> None:
    """Refuses windows that are too long or hold ids outside the vocabulary; `check_positions`."""
    if windows:
        check_positions(adapter, decoder, windows[0].tokens.shape[1])
    for batch in windows:
        decoder.check(batch.tokens)


def check_positions(adapter: Adapter, decoder: Decoder, length: int) -> None:
    """Refuses windows that end behind a model's learned positions; shapes alone are looked at.

    Raises:
        ValueError: prompt and window together are too long.
    """
    if decoder.config.rope is not None:
        return
    repaired = jax.eval_shape(lambda adapter, decoder: adapter.repair(decoder), adapter, decoder)
    prompt = 0 if repaired.prefix is None else repaired.prefix.length
    room = decoder.config.max_positions - prompt
    if length > room:
        behind = f" behind a prompt of {prompt}" if prompt else ""
        raise ValueError(
            f"--data.sequence-length {length}{behind} exceeds the model's "
            f"{decoder.config.max_positions} learned positions; give {max(room, 0)} at most"
        )


def check_tokens(config: Train, text: TrainingText) -> None:
    """Refuses held-out windows with ids outside the vocabulary, before the model is loaded.

    The others are looked at batch by batch, as they are trained on: to read them all now would
    bring the whole text into memory.

    Raises:
        ValueError: the tokenizer belongs to another model.
    """
    abstract(from_hf(open_config(config.model))).check(text.validation)


def _check_sources(config: Train) -> None:
    data = config.data
    if data.train is None:
        raise ConfigError(
            "--data.train is missing: give a .txt or .jsonl file, hub:NAME, or self (text that "
            "--teacher.model, or the model itself, writes)"
        )
    for source in (data.train, data.validation, config.init.file and str(config.init.file)):
        if source is None or source == SELF or source.startswith(HUB):
            continue
        if not local(source).is_file():
            raise ValueError(f"there is no text file {source}; check the path")
