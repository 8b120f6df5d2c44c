"""The files of a model's folder: JSON that is whole, names that stay inside, what users would miss.

The invariant: whatever is wrong with a file is a `CheckpointError` of one line that names it.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from idp_jax.models.config import token_ids


def _in_any_case(start: str) -> str:
    """A pattern of all names that begin so, in capitals or not."""
    return "".join(f"[{x}{x.upper()}]" if x.isalpha() else x for x in start) + "*"


# What belongs to a model besides its configuration and its weights. Python files are those of a
# tokenizer that other programs may run; nothing here does.
SIDECARS = (
    "generation_config.json",
    *("tokenizer*", "tokenization_*.py", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "additional_chat_templates/*"),
    *map(_in_any_case, ("readme", "licen", "copying", "notice", "use_policy")),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: what is wrong, where, and what to do."""


def reason(error: BaseException) -> str:
    """What an error says, on one line of moderate length."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # without colours
    text = " ".join(plain.split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it cannot be read, or is no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({reason(error)}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch it again")
    return content


def refuse_custom_code(file: Path, error: BaseException) -> None:
    """Says of a file that could not be used that this is because it needs code of its own.

    Raises:
        CheckpointError: it does, or it is no JSON at all.
    """
    code = read_json(file).get("auto_map")
    if code and "custom code" in str(error):
        raise CheckpointError(
            f"{file} needs custom code ({', '.join(map(str, code)):.100}), which is never run; "
            "give a model and a tokenizer that transformers knows"
        ) from error


def inside(folder: Path, name: Any, said_by: Path) -> Path:
    """The path of a file that another one names; links are followed, as the hub's cache needs.

    Args:
        said_by: the file that names it, for the message.

    Raises:
        CheckpointError: it is no name, or leaves the folder.
    """
    if isinstance(name, str) and name and "\0" not in name:
        root = os.path.abspath(folder)
        if os.path.abspath(os.path.join(root, name)).startswith(os.path.join(root, "")):
            return folder / name
    raise CheckpointError(
        f"{said_by} names {name!r:.100}, which is no file inside {folder}; fetch it again"
    )


def stop_ids(folder: Path) -> tuple[int, ...] | None:
    """The tokens at which generation_config.json ends a text; None where there is no such file.

    Like transformers' `generate`, which asks config.json only where this file is absent.

    Raises:
        CheckpointError: it is damaged.
        ValueError: its eos_token_id is no token.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    return token_ids(read_json(file).get("eos_token_id"), f"eos_token_id in {file}")


def copy_sidecars(source: Path, out: Path) -> None:
    """Copies the `SIDECARS` of one folder into another, byte by byte."""
    for pattern in SIDECARS:
        for file in sorted(source.glob(pattern)):
            target = out / file.relative_to(source)
            if file.is_file() and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
