"""What a run reads and takes, and whether it is done: its result and its adapter are whole."""

import re
from pathlib import Path
from typing import Any

from idp_jax import formats
from idp_jax.config import ConfigError, Train, url_of
from idp_jax.config.files import to_dict
from idp_jax.data.sources import SELF
from idp_jax.jobs.files import contents, fingerprint, read_json, seal
from idp_jax.jobs.folder import differences
from idp_jax.jobs.remote import local
from idp_jax.training.starts import report_file

ADAPTERS = ("adapter", "last")
"""Folders of a run: the adapter of the best validation, and that of the last step."""

_CODE = re.compile(r"[^\s*+()]+\.py(?=:)")
_TOKEN_BYTES = 3  # of a token's text, at least in English


def inputs(config: Train) -> dict[str, dict[str, str]]:
    """The fingerprints of what a run reads."""
    read = {"model": str(formats.resolve(config.model)), "data.train": config.data.train}
    if config.data.validation is not None:
        read["data.validation"] = config.data.validation
    for name in ("data.train", "data.validation"):
        if url_of(read.get(name)) is not None:
            read[name] = str(local(read[name]))
    if config.init.file is not None:
        read["init.file"] = str(config.init.file)
    if config.prefix.by_damage:
        read["prefix.by-damage"] = str(report_file(config))
    if config.teacher.model is not None:
        read["teacher.model"] = str(formats.resolve(config.teacher.model))
    for option in ("selector", "objective"):  # code of one's own
        for file in _CODE.findall(getattr(config, option)):
            read[f"{option} {file}"] = file
    return {name: fingerprint(path) for name, path in read.items()}


def needed(config: Train) -> int:
    """Bytes that a run takes at least: of the text that it writes itself."""
    written = config.data.train == SELF and not (Path(config.out) / "self_text.jsonl").is_file()
    return config.tokens * _TOKEN_BYTES if written else 0


def finished(config: Train, free: tuple[str, ...]) -> dict[str, Any] | None:
    """What a finished run found, or None where there is still something to do.

    Args:
        free: settings that may differ; where it is the budget, the run goes on to the new one.

    Raises:
        ConfigError: the result or its adapter is damaged, or another's.
    """
    file = Path(config.out) / "result.json"
    if not file.is_file():
        return None
    remedy = f"remove it, and the same command goes on from the last checkpoint in {config.out}"
    result, asked = read_json(file, remedy), to_dict(config)
    known, own = result.get("config"), {key: result[key] for key in result if key != "digest"}
    files: dict[str, Any] = {name: result.get(name) for name in ADAPTERS}
    known = known if isinstance(known, dict) else {}
    whole = result.get("digest") == seal(own) and _are_files(files)
    if differences(known, asked, free) or not whole:
        raise ConfigError(f"{file} is not what this run found; {remedy}")
    # One that is gone is written again, from the last checkpoint.
    folders = {name: Path(config.out) / name for name in ADAPTERS}
    gone = any(not folder.exists() for folder in folders.values())
    if gone or known.get("tokens") != config.tokens:
        return None
    for name, folder in folders.items():
        found = contents(folder)
        wrong = next((key for key, value in files[name].items() if found.get(key) != value), None)
        if wrong is not None:
            raise ConfigError(
                f"{folder / wrong} is not as this run wrote it; remove {folder}, and the same "
                "command writes it again"
            )
    return result


def _are_files(files: dict[str, Any]) -> bool:
    return all(isinstance(found, dict) for found in files.values())
