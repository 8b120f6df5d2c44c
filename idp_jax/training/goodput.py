"""Where the time of a run goes: into its steps, or into what is beside them."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Goodput:
    """The seconds of one call by what they went to.

    Those of "steps" are the devices': from the numbers of one step to those of the next. "input" is
    what the loop waited for text while no step was under way.

    Attributes:
        tokens: that the steps have read.
    """

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens = 0
        self._begun = time.perf_counter()

    @contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Counts what is done inside."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - begun

    def summary(self, fastest: float | None) -> dict[str, Any]:
        """For result.json: "goodput", the share of steps in all the time, and the seconds.

        Args:
            fastest: tokens a second at the devices' peak; where it is known, "mfu" is what was
                reached of it in steps.
        """
        total = time.perf_counter() - self._begun
        steps = self.seconds["steps"]
        seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        found = {"goodput": steps / total, "seconds": {**seconds, "all": round(total, 3)}}
        if fastest is not None and steps:
            found["mfu"] = self.tokens / steps / fastest
        return found
