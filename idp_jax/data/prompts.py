"""Files of prompts, one a line."""

from pathlib import Path
from typing import Any

from idp_jax.data.text import fields_of, read_lines

Prompt = str | list[dict[str, Any]]  # a text, or the messages of a conversation
_PARTS = ("role", "content")  # of a message


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file: `.txt`, one a line, or `.jsonl`; each may end in `.gz`.

    A row of a `.jsonl` file is {"prompt": text}, or {"messages": [{"role": ..., "content": ...},
    ...]}. Blank lines are none.

    Raises:
        ValueError: the file is missing, of another kind or holds no prompt, or a row is none; the
            message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file of prompts {path}; check the path")
    name = path.name.lower().removesuffix(".gz")
    if not name.endswith((".txt", ".jsonl")):
        raise ValueError(f"cannot read prompts from {path}; give a .txt or .jsonl file")
    found: list[Prompt] = []
    for number, line in read_lines(path):
        found.append(_prompt(f"{path}:{number}", line) if name.endswith(".jsonl") else line)
    if not found:
        raise ValueError(f"{path} holds no prompt; give another file")
    return found


def _prompt(where: str, line: str) -> Prompt:
    fields = fields_of(where, line)
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if isinstance(prompt, str) and prompt:
        return prompt
    good = isinstance(messages, list) and all(map(_is_message, messages))
    if prompt is not None or not good or not messages:
        raise ValueError(
            f'{where} holds no prompt; expected {{"prompt": "text"}}, or {{"messages": '
            '[{"role": "user", "content": "text"}]}'
        )
    return messages


def _is_message(given: Any) -> bool:
    return isinstance(given, dict) and all(isinstance(given.get(k), str) for k in _PARTS)
