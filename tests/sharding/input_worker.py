"""One of two processes, for `test_input.py`: what it reads of a batch, printed as JSON."""

import json
import sys
from itertools import count

import numpy as np

from idp_jax.config import Mesh
from idp_jax.data import stream, windows
from idp_jax.data.ahead import Ahead
from idp_jax.data.stream import TrainingText
from idp_jax.processes import gather, mesh_of
from idp_jax.sharding import shard_batch, share

LENGTH, SIZE, BATCHES = 8, 8, 12


class Counting:
    """A tokenizer of one id per character that counts them."""

    tokens = 0

    def __call__(self, text, verbose=True):
        Counting.tokens += len(text)
        return {"input_ids": [ord(character) for character in text]}


def local() -> TrainingText:
    """A text of 36 windows."""
    found = np.arange(40 * LENGTH, dtype=np.int32).reshape(40, LENGTH)
    return TrainingText("", None, LENGTH, found[:4], found[4:], 0, 7)


def main() -> None:
    """Takes batches of a local text, and of a stream."""
    mesh = mesh_of(Mesh(data=2, fsdp=2))
    own = share(SIZE, mesh)
    assert own is not None
    batches = Ahead(local().batches(SIZE, own.rows))
    placed = [shard_batch(next(batches), mesh, own).tokens for _ in range(BATCHES)]
    batches.close()
    windows._DOCUMENTS_AT_A_TIME = 1
    stream.documents = lambda *rest, **options: (chr(1000 + n) * 20 for n in count())
    options = {"validation": None, "validation_windows": 2, "seed": 0}
    text = TrainingText.open("hub:some", Counting(), LENGTH, **options)
    Counting.tokens, streamed = 0, text.batches(SIZE, own.rows)
    for _ in range(BATCHES):
        next(streamed)
    whole = [gather(tokens).tolist() for tokens in placed]
    print(
        json.dumps({"rows": own.rows.tolist(), "whole": whole, "tokens": Counting.tokens}),
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
