"""Batches that are made ready in a thread, by grain, while the devices work.

A thread is enough: tokenizers work outside of the interpreter's lock most of the time, and of
several processes each makes only its own rows. The invariant: the state is the place behind the
last batch that was taken, however many are ready behind it.
"""

from typing import Any

from idp_jax.data.batch import Batch
from idp_jax.data.stream import Batches

_READY = 2  # batches


class Ahead:
    """Batches as `Batches` gives them; what goes wrong is raised where the batch is taken."""

    def __init__(self, batches: Batches):
        from grain.experimental import ThreadPrefetchIterDataset

        source = _source(batches)
        self._batches = iter(ThreadPrefetchIterDataset(source, prefetch_buffer_size=_READY))

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> Batch:
        """The next batch, as of `Batches`."""
        return next(self._batches)

    def state(self) -> dict[str, Any]:
        """Where the next batch begins, as plain JSON."""
        return dict(self._batches.get_state())

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to the place of a `state`; what was made ready is forgotten."""
        self._batches.set_state(state)

    def close(self) -> None:
        """Ends the thread; nothing is taken after that."""
        self._batches.close()
        # One that lives until the interpreter ends is closed once more, and says that it cannot be.
        del self._batches


def _source(batches: Batches) -> Any:
    """Batches as grain's own kind of iterator."""
    import grain

    class Places(grain.DatasetIterator):
        """One pass, which has no end."""

        def __next__(self) -> Batch:
            return next(batches)

        def get_state(self) -> dict[str, Any]:
            return batches.state()

        def set_state(self, state: dict[str, Any]) -> None:
            batches.restore(state)

    class Source(grain.IterDataset):
        """What is iterated once."""

        def __iter__(self) -> Places:
            return Places()

    return Source()
