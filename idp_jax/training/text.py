"""The text of a run: a source opened, or text that the model writes for itself, once."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from idp_jax.config import ConfigError, Train
from idp_jax.data.self_text import sample_documents
from idp_jax.data.stream import TrainingText
from idp_jax.jobs.files import digest, read_json, write_json, write_text
from idp_jax.jobs.progress import Progress, expecting
from idp_jax.models.decoder import Decoder
from idp_jax.processes import first_process
from idp_jax.training.checks import check_tokens
from idp_jax.training.teacher import Teacher


def open_text(config: Train, out: Path, source: str, tokenizer) -> TrainingText:
    """Reads a source, and refuses held-out windows that the model cannot take."""
    text = TrainingText.open(
        source,
        tokenizer,
        config.data.sequence_length,
        validation=config.data.validation,
        validation_windows=config.data.validation_windows,
        seed=config.seed,
        folder=out,
        apart=config.data.documents == "apart",
    )
    check_tokens(config, text)
    return text


def self_text(
    config: Train,
    out: Path,
    decoder: Decoder,
    teacher: Teacher,
    tokenizer,
    progress: Progress,
    say: Callable,
) -> str:
    """Text of the model's own, written once into a file that is then read like any other."""
    file, kept = out / "self_text.jsonl", out / "self_text.partial.jsonl"
    written = out / "self_text.digest.json"
    remedy = f"remove {file}, and the same command writes it again"
    if file.is_file() and read_json(written, remedy).get(file.name) != digest(file):
        raise ConfigError(f"{file} is not as this run wrote it; {remedy}")
    if not file.is_file():
        writer = decoder if config.teacher.model is None else teacher.decoder
        held_out = 0 if config.data.validation else config.data.validation_windows
        wanted = config.tokens + (held_out + 1) * config.data.sequence_length
        doing = "sampling text from the model"
        with progress.bar(doing, "tokens") as update:
            texts = sample_documents(
                writer,
                tokenizer,
                wanted,
                document_tokens=min(config.data.sequence_length, 512),
                seed=config.seed,
                progress=expecting(update, doing, "tokens", say),
                kept=kept,
            )
        teacher.release()
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)

        def write() -> None:  # its digest first: a text without one is not this run's
            write_json(written, {file.name: hashlib.sha256(lines.encode()).hexdigest()})
            write_text(file, lines)

        first_process(write, "text")
    first_process(lambda: kept.unlink(missing_ok=True), "text: sampled")
    return str(file)
