"""What a launcher says of a job of several processes, before JAX is imported."""

import os


def number(variable: str) -> int | None:
    """The value of a variable of the environment, or None where it is not set."""
    return int(os.environ[variable]) if variable in os.environ else None


def launched_together() -> bool:
    """Whether a launcher started this process as one of several."""
    counts = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    several = any((number(name) or 1) > 1 for name in counts)
    return several or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
