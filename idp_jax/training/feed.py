"""What a training takes its batches from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from idp_jax.data.batch import Batch


class BatchIterator(Iterator[Batch], Protocol):
    """Batches without end that know where they are, see `data.stream.Batches`."""

    def state(self) -> dict[str, Any]:
        """The place of the next batch, as plain JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to the place of a `state`."""
        ...


@dataclass
class Feed:
    """Batches made ready, the next of which can be looked at; its place is the same until taken."""

    batches: BatchIterator
    prepare: Callable[[Batch], Batch]
    ahead: tuple[dict[str, Any], Batch] | None = None

    def look(self) -> Batch:
        """The next batch, which stays the next."""
        if self.ahead is None:
            place = self.batches.state()
            self.ahead = place, self.prepare(next(self.batches))
        return self.ahead[1]

    def take(self) -> Batch:
        """The next batch."""
        batch, self.ahead = self.look(), None
        return batch

    def state(self) -> dict[str, Any]:
        """The place of the next batch, as plain JSON."""
        return self.batches.state() if self.ahead is None else self.ahead[0]

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to the place of a `state`."""
        self.batches.restore(state)
        self.ahead = None
