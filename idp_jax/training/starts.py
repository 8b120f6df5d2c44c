"""What the settings give an adapter to begin as: its part of a text, and the teacher.

The rule for text: the token that the tokenizer puts first, if it does, stands first in every
prompt, as before any text; behind it each prompt takes the tokens that follow the part of the one
before. One prompt may be longer than the text, which is then repeated; those of a pool must differ,
so that the text must be long enough for all of them. An empty text is the BOS token alone, also of
a tokenizer that knows one and does not put it before texts.
"""

from collections.abc import Callable, Iterator, Sequence
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
    """A start of a run for a trial without numbers, all of it shapes."""
    ids: Any = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    text = tuple(ids(length) for length in run.text)
    windows = ids(run.windows, config.data.sequence_length) if run.windows else None
    segments = windows if config.data.documents == "apart" else None
    teacher = None
    if run.teacher:
        teacher = abstract(from_hf(open_config(str(config.teacher.model))))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Start(key, text, teacher, windows, segments)


def starts(
    config: Train,
    runs: Sequence[Run],
    keys: Sequence[jax.Array],
    tokenizer: Any,
    text: TrainingText,
    teacher: Callable[[], Decoder],
) -> list[Start]:
    """What every run of a training begins with.

    Args:
        teacher: gives the uncompressed model; called where a run asks for it, once.

    Raises:
        ConfigError: the text to begin with is too short.
    """
    lengths = [length for run in runs for length in run.text]
    parts = iter(text_parts(config, lengths, tokenizer, text))
    model = teacher() if any(run.teacher for run in runs) else None
    found = []
    for run, key in zip(runs, keys, strict=True):
        windows = segments = None
        if run.windows:
            windows, segments, *_ = jax.tree.map(jnp.asarray, text.first(run.windows))
        own = tuple(islice(parts, len(run.text)))
        found.append(Start(key, own, model if run.teacher else None, windows, segments))
    return found


def text_parts(
    config: Train, lengths: Sequence[int], tokenizer: Any, text: TrainingText
) -> list[jax.Array]:
    """Tokens int32 [n] for each length n, by the rule above."""
    if not lengths:
        return []
    first = _first_token(tokenizer, always=config.init.text == "")
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
        found.append(jnp.asarray(np.concatenate([first, own])[:length], jnp.int32))
    return found


def _first_token(tokenizer: Any, *, always: bool) -> np.ndarray:
    """The BOS token where the tokenizer puts one before every text: int32 [1], otherwise [0].

    Args:
        always: take it also where the tokenizer only knows one.
    """
    bos = tokenizer.bos_token_id
    puts = bos is not None and (always or tokenizer("a")["input_ids"][0] == bos)
    return np.asarray([bos] if puts else [], np.int32)


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
