"""Documents from local files and from the Hugging Face hub."""

from collections.abc import Iterator

from idp_jax.data.text import Document, read_documents
from idp_jax.jobs.remote import local

SELF = "self"
HUB = "hub:"
_SHUFFLE_BUFFER = 10_000


def documents(source: str, *, seed: int = 0, shuffle: bool = False) -> Iterator[Document]:
    """One pass over the documents of a source, which are read as they are asked for.

    Args:
        source: a .txt or .jsonl file (or its .gz) or a URL of one, or hub:NAME[:CONFIG] (streamed,
            split "train", field `text`).
        shuffle: draw the documents by the seed instead of in their own order.

    Raises:
        ValueError: the source is missing or holds no text.
    """
    if source.startswith(HUB):
        yield from _hub_documents(source, seed, shuffle)
    else:
        yield from read_documents(local(source), seed if shuffle else None)


def _hub_documents(source: str, seed: int, shuffle: bool) -> Iterator[str]:
    from datasets import load_dataset

    name, _, config = source.removeprefix(HUB).partition(":")
    try:
        stream = load_dataset(name, config or None, split="train", streaming=True)
        if shuffle:
            stream = stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        for number, row in enumerate(stream):
            if not isinstance(row["text"], str):
                raise TypeError(f"row {number} has no text but {row['text']!r:.40}")
            yield row["text"]
    except KeyError as error:
        raise ValueError(
            f"dataset {name} has no field {error}; give one with a field 'text'"
        ) from error
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"dataset {name} cannot be read from the hub ({reason}); check the name, or give a "
            "local .jsonl file"
        ) from error
