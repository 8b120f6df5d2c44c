"""A trace of some steps of a training, for people who want to know what its time goes to."""

from collections.abc import Callable
from pathlib import Path

import jax

from idp_jax.jobs import signals

WARM_UP = 2
"""Steps in front of the first that is traced."""


class Profile:
    """Writes the trace of some steps behind the first ones, on process 0.

    Args:
        folder: where the files go.
        steps: to trace; 0 for none.
        say: told where the trace is.
    """

    def __init__(self, folder: Path, steps: int, say: Callable[[str], None] = lambda line: None):
        self.folder, self.steps, self._say = folder, steps, say
        self._first: int | None = None
        self._done = False

    def begins(self, before: int) -> bool:
        """Whether it is time to start.

        Args:
            before: steps that this call has begun.
        """
        return self.steps > 0 and before == WARM_UP

    def start(self, step: int) -> None:
        """Starts at a step, while none is under way."""
        self._first = step
        if jax.process_index() == 0:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # which slows a step down more than it tells
            jax.profiler.start_trace(self.folder, profiler_options=options)

    def ends(self, step: int) -> bool:
        """Whether a step is the last to be traced."""
        return self._first is not None and step >= self._first + self.steps - 1

    def close(self, step: int) -> None:
        """Ends at the last step where the end was not reached, and says where none was traced."""
        self.stop(step)
        if self.steps and not self._done:
            self._say(f"nothing was traced: no step came behind the first {WARM_UP} of this call")

    def stop(self, step: int) -> None:
        """Ends at a step, when none is under way; does nothing where nothing was started."""
        if self._first is None:
            return
        first, self._first, self._done = self._first, None, True
        if jax.process_index() == 0:
            with signals.hold():  # a long trace takes longer to write than a signal waits
                jax.profiler.stop_trace()
            self._say(
                f"the trace of steps {first} to {step} is in {self.folder}: give its "
                ".trace.json.gz to https://ui.perfetto.dev, or the folder to xprof"
            )
