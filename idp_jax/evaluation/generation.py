"""`idp-jax generate`: prompts in, texts out, with a model and its repair.

Whatever can be told without the model (prompts, adapter, the place of the texts) is looked at
before it is loaded.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from idp_jax import formats
from idp_jax.config import ConfigError, Generate
from idp_jax.data.prompts import Prompt, read_prompts
from idp_jax.evaluation.job import claimed
from idp_jax.formats.adapters import read_adapter
from idp_jax.formats.source import open_config
from idp_jax.inference.continuous import Completion, complete
from idp_jax.inference.text import encode_prompt
from idp_jax.jobs.files import write_text
from idp_jax.jobs.progress import SILENT, Progress
from idp_jax.models.abstract import abstract
from idp_jax.models.config import from_hf
from idp_jax.processes import mesh_of
from idp_jax.recover import Repaired
from idp_jax.sharding import shard


@dataclass(frozen=True)
class Texts:
    """What was generated.

    Attributes:
        rows: one for each prompt, as they are written.
        seconds: that decoding took, compilation included.
    """

    rows: list[dict[str, Any]]
    seconds: float

    @property
    def tokens(self) -> int:
        """New tokens of all rows."""
        return sum(row["tokens"] for row in self.rows)


def generate_texts(
    settings: Generate,
    *,
    progress: Progress = SILENT,
    told: Callable[[str], object] = lambda text: None,
) -> Texts:
    """Continues the prompts of the settings, and writes the texts where they ask for it.

    Args:
        told: called with what is new of the text of a single prompt.

    Raises:
        ConfigError: the texts may not be written there.
        ValueError: a prompt, the model or its adapter cannot be used.
    """
    with _place(settings) as mesh:
        if jax.process_count() > 1:
            raise ConfigError("generate runs in one process; start it once")
        tokenizer = formats.load_tokenizer(settings.model)
        single = settings.prompt is not None
        prompts = [settings.prompt] if settings.prompt is not None else _read(settings)
        ids = [_ids(tokenizer, prompt, n, settings.chat) for n, prompt in enumerate(prompts)]
        repaired = _load(settings, mesh, progress)
        rows: list[dict[str, Any]] = [{} for _ in prompts]
        started, done = time.perf_counter(), 0
        with (SILENT if single else progress).bar("generating", "texts") as update:
            for number, new, completion in _complete(settings, repaired, tokenizer, ids):
                if single:
                    told(new)
                if completion is not None:
                    rows[number] = _row(prompts[number], completion)
                    done += 1
                    update(done, len(rows))
        seconds = time.perf_counter() - started
        if settings.out is not None:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(settings.out, "".join(lines))
    return Texts(rows, seconds)


@contextmanager
def _place(settings: Generate) -> Iterator[jax.sharding.Mesh | None]:
    """Holds the place of the texts, if there is one, and the mesh."""
    if settings.out is not None:
        with claimed(settings.out, settings.overwrite, settings.mesh, _is_texts) as mesh:
            yield mesh
        return
    mesh = mesh_of(settings.mesh)
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        yield mesh


def _is_texts(path: Path) -> bool:
    """Whether a file holds what is written here."""
    try:
        with path.open(encoding="utf-8") as file:
            return "finish_reason" in json.loads(file.readline())
    except (OSError, ValueError, TypeError):
        return False


def _read(settings: Generate) -> list[Prompt]:
    assert settings.prompts is not None
    return read_prompts(settings.prompts)


def _ids(tokenizer: Any, prompt: Prompt, number: int, chat: bool) -> list[int]:
    try:
        return encode_prompt(tokenizer, prompt, chat=chat)
    except ValueError as error:
        raise ValueError(f"prompt {number}: {error}") from error


def _load(settings: Generate, mesh: jax.sharding.Mesh | None, progress: Progress) -> Repaired:
    """The model with its repair; the adapter is held against the model's configuration first."""
    adapter = None
    if settings.adapter is not None:
        model = abstract(from_hf(open_config(settings.model)))
        adapter = read_adapter(model, settings.adapter, settings.selector)
    held = {**settings.held, "dtype": settings.dtype or formats.default_dtype()}
    model = formats.load_model(
        settings.model, **held, mesh=mesh, progress=progress.tracker("loading")
    )
    return Repaired.of(model) if adapter is None else shard(adapter, mesh).repair(model)


def _complete(settings: Generate, repaired: Repaired, tokenizer: Any, ids: list[list[int]]):
    own = {tokenizer.eos_token_id} - {None}
    return complete(
        repaired,
        tokenizer,
        ids,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        stop=settings.stop,
        stop_ids=sorted(own | {*repaired.decoder.config.eos_token_ids}),
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=settings.seed,
    )


def _row(prompt: Prompt, completion: Completion) -> dict[str, Any]:
    asked = "prompt" if isinstance(prompt, str) else "messages"
    return {
        asked: prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "tokens": completion.tokens,
        "chosen_prompt": completion.choice,
    }
