"""A signal to one process of a job stops all of them behind the same step.

Each tells the others at every check point of the training whether it was asked to stop, by a number
that goes over the devices behind the step, and reads what was told at the check point before, so
that nothing waits for it: all stop one check point after the signal, and save as one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from idp_jax.jobs import signals
from idp_jax.jobs.signals import Interrupted
from idp_jax.processes import largest

Report = Callable[[int, int, str], None]


@contextmanager
def stopping_together(progress: Report) -> Iterator[Report]:
    """`progress`, which raises Interrupted at the same call in every process of the job.

    Args:
        progress: called equally often in all of them; a check point.
    """
    if jax.process_count() == 1:
        yield progress
        return
    told: jax.Array | None = None

    def report(step: int, steps: int, note: str = "") -> None:
        nonlocal told
        progress(step, steps, note)
        before, told = told, largest(signals.asked())
        number = 0 if before is None else int(before)
        if number:
            raise Interrupted(number)

    with signals.together():
        try:
            yield report
        except Interrupted:
            jax.distributed.shutdown()  # which waits: the others need this process to save
            raise
