"""From text to rows of ids, and back."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def is_text(prompts: Any) -> bool:
    """Whether prompts are a text or several, and not ids."""
    return isinstance(prompts, str) or (
        isinstance(prompts, list | tuple) and len(prompts) > 0 and isinstance(prompts[0], str)
    )


def encode(tokenizer: Any, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int32 [B, T], of texts, padded on the left.

    Raises:
        ValueError: a text has no tokens.
    """
    rows = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    empty = [text for text, row in zip(texts, rows, strict=True) if not row]
    if empty:
        raise ValueError(f"the prompt {empty[0]!r} has no tokens; give text to continue")
    longest = max(map(len, rows))
    ids = np.zeros((len(rows), longest), np.int32)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return ids, mask


def encode_prompt(tokenizer: Any, prompt: str | list[dict], *, chat: bool = False) -> list[int]:
    """Ids of a prompt.

    Args:
        prompt: a text; or messages, of which the tokenizer's chat template makes one.
        chat: whether a text is a user's message.

    Raises:
        ValueError: it has no tokens, or there is no template, or one that refuses the messages.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    templated = chat or messages is prompt
    text = _templated(tokenizer, messages) if templated else prompt
    assert isinstance(text, str)
    if found := next((c for c in text if "\ud800" <= c <= "\udfff"), None):
        raise ValueError(f"the prompt holds half a character, \\u{ord(found):04x}; give whole ones")
    # What a template makes has its special tokens already.
    ids = tokenizer(text, verbose=False, add_special_tokens=not templated)["input_ids"]
    if not ids:
        raise ValueError(f"the prompt {text!r} has no tokens; give text to continue")
    return ids


def _templated(tokenizer: Any, messages: list[dict]) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template, so messages make no prompt; give text alone, or "
            "an instruct model"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises
        reason = " ".join(str(error).split())
        raise ValueError(f"the chat template refuses the messages: {reason}") from error


class GrowingText:
    """The text of tokens as they come: whole characters, and nothing of a stop string.

    Attributes:
        given: what has been given out.
        stopped: whether a stop string was met; the text ends before it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.given = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = [string for string in stop if string]
        self._ids: list[int] = []

    def add(self, token: int) -> str:
        """The text that is certain now; what may begin a stop string waits."""
        self._ids.append(token)
        text = self._text()
        ends = [text.index(string) for string in self._stop if string in text]
        if ends:
            self.stopped = True
            return self._give(text[: min(ends)])
        # Tokens may be bytes: of a character that is not complete this is the decoder's sign.
        text = text.rstrip("\ufffd")
        begun = (n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n]))
        return self._give(text[: len(text) - max(begun, default=0)])

    def end(self) -> str:
        """What is left, when no token follows."""
        return "" if self.stopped else self._give(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)

    def _give(self, text: str) -> str:
        new = text[len(self.given) :] if text.startswith(self.given) else ""
        self.given += new
        return new


def decode(tokenizer: Any, rows: np.ndarray, stop_ids: Sequence[int]) -> list[str]:
    """The text of every row up to the token that stopped it."""
    texts = []
    for row in rows.tolist():
        ends = [row.index(stop) for stop in stop_ids if stop in row]
        texts.append(tokenizer.decode(row[: min(ends, default=len(row))], skip_special_tokens=True))
    return texts
