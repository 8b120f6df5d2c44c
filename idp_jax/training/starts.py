"""What the settings give an adapter to begin as: its part of a text, and the teacher.

The rule for text: the token that the tokenizer puts first, if it does, stands first in every
prompt, as before any text; behind it each prompt takes the tokens that follow the part of the one
before. One prompt may be longer than the text, which is then repeated; those of a pool must differ,
so that the text must be long enough for all of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idp_jax import formats
from idp_jax.config import ConfigError, Train
from idp_jax.data.sources import HUB, documents
from idp_jax.data.stream import TrainingText
from idp_jax.data.text import join_documents
from idp_jax.data.tokens import token_ids
from idp_jax.formats.source import open_config
from idp_jax.jobs.files import read_json
from idp_jax.models.abstract import abstract
from idp_jax.models.config import from_hf
from idp_jax.models.decoder import Decoder
from idp_jax.recover.methods import Run
from idp_jax.recover.prefix import lengths_by_damage
from idp_jax.recover.starts import Start


def load_teacher(config: Train, mesh: jax.sharding.Mesh | None) -> Decoder:
    """The uncompressed model of the settings, held as the model is."""
    return formats.load_model(str(config.teacher.model), **config.held, mesh=mesh)


def needs_teacher(config: Train) -> bool:
    """Whether a start is made of the uncompressed model."""
    return config.init.model == "teacher"


def resolved(config: Train) -> Train:
    """The settings with the length of each layer where the model's damage gives them.

    Raises:
        ConfigError: the model's folder does not tell of its damage.
    """
    if not config.prefix.by_damage:
        return config
    lengths = lengths_by_damage(_damage(config), config.prompt_length)
    return replace(config, prefix=replace(config.prefix, lengths=lengths, by_damage=False))


def _damage(config: Train) -> list[float]:
    """The mean relative error of every layer's matrices, from the report beside the model."""
    file = report_file(config)
    if not file.is_file():
        raise ConfigError(
            f"--prefix.by-damage needs {file}, the report of a compression, and there is none; "
            "give --prefix.lengths"
        )
    report = read_json(file, "give --prefix.lengths instead")
    layers = range(from_hf(open_config(config.model)).num_layers)
    try:
        rows = [(row["layer"], float(row["relative_error"])) for row in report["matrices"]]
        return [float(np.mean([e for layer, e in rows if layer == n] or [np.nan])) for n in layers]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{file} has no relative_error of every matrix; give --prefix.lengths"
        ) from error


def report_file(config: Train) -> Path:
    """Where a compression says what it did to the model."""
    return formats.resolve(config.model) / "compression.json"


def abstract_start(config: Train, run: Run) -> Start:
    """A start's shapes, for a trial without numbers; the teacher is left to the caller's trace."""
    text = jnp.zeros((run.text,), jnp.int32) if run.text else None
    shape = (run.windows, config.data.sequence_length)
    windows = jnp.zeros(shape, jnp.int32) if run.windows else None
    teacher = None
    if needs_teacher(config):
        teacher = abstract(from_hf(open_config(str(config.teacher.model))))
    return Start(jax.random.key(0), text, teacher, windows)


def starts(
    config: Train,
    runs: Sequence[Run],
    keys: Sequence[jax.Array],
    tokenizer: Any,
    text: TrainingText,
    teacher: Decoder | None,
) -> list[Start]:
    """What every run of a training begins with.

    Raises:
        ConfigError: the text to begin with is too short.
    """
    parts = text_parts(config, [run.text for run in runs], tokenizer, text)
    found = []
    for run, key, part in zip(runs, keys, parts, strict=True):
        windows = None
        if run.windows:
            windows = jnp.asarray(np.stack(list(islice(text.windows(), run.windows))))
        found.append(Start(key, part, teacher, windows))
    return found


def text_parts(
    config: Train, lengths: Sequence[int], tokenizer: Any, text: TrainingText
) -> list[jax.Array | None]:
    """Tokens int32 [n] for each length n, by the rule above; None for a length of 0."""
    if not any(lengths):
        return [None for _ in lengths]
    first = _first_token(tokenizer)
    wanted = sum(max(length - len(first), 0) for length in lengths)
    body = _body(config, wanted + len(first), tokenizer, text, first)[:wanted]
    if len(body) < wanted and (not len(body) or len(lengths) > 1):
        raise ConfigError(
            f"the text to begin with has {len(body)} tokens, too few for {wanted}; give more by "
            "--init.text or --init.file"
        )
    body = np.resize(body, wanted)
    found, place = [], 0
    for length in lengths:
        own = body[place : place + length - len(first)] if length > len(first) else body[:0]
        place += len(own)
        tokens = np.concatenate([first, own])[:length].astype(np.int32)
        found.append(jnp.asarray(tokens) if length else None)
    return found


def _first_token(tokenizer: Any) -> np.ndarray:
    """The token that the tokenizer puts before every text, int32 [1], or [0] where it puts none."""
    ids = tokenizer("a")["input_ids"]
    puts = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    return np.asarray(ids[:1] if puts else [], np.int32)


def _body(
    config: Train, count: int, tokenizer: Any, text: TrainingText, first: np.ndarray
) -> np.ndarray:
    """The first tokens of the text to begin with, at most `count`, without the very first."""
    init, skip = config.init, 0
    if init.text is not None:
        pieces: Any = [init.text]
    elif init.file is not None:
        pieces = join_documents(documents(str(init.file)))
    else:
        # Of a stream the first windows may be held out, of a file the last ones.
        streamed = text.source.startswith(HUB)
        skip = text.held_out * text.length
        if text.local is not None:
            count = min(count, len(text.local) * text.length)
        texts = documents(text.source, seed=text.seed, shuffle=streamed)
        pieces = join_documents(texts)
    ids = np.asarray(list(islice(_one_by_one(token_ids(tokenizer, pieces)), skip + count)), "i4")
    ids = ids[skip:]
    return ids[len(first) :] if len(first) and not skip and list(ids[:1]) == list(first) else ids


def _one_by_one(arrays: Iterator[np.ndarray]) -> Iterator[int]:
    for array in arrays:
        yield from array.tolist()
