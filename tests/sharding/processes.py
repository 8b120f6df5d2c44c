"""Jobs of one process and of two, by the command line, each with CPU devices of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

_CALL = "from idp_jax.cli import main; main()"


def start(
    *arguments: object, devices: int = 1, code: str = _CALL, **variables: str
) -> subprocess.Popen:
    """`idp-jax ARGUMENTS` in a process of its own.

    Args:
        devices: of its CPU.
        code: what it runs instead.
        variables: of its environment.
    """
    own = {key: value for key, value in os.environ.items() if not key.startswith("XLA_")}
    own |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=own | variables,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_together(*arguments: object, devices: int = 4, **variables: str) -> list:
    """Two processes of one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", **variables}
    return [
        start(*arguments, devices=devices, JAX_PROCESS_ID=str(number), **together)
        for number in range(2)
    ]


def finish(processes: list[subprocess.Popen], status: int = 0) -> list[str]:
    """Waits for processes that must end with this status; returns what each said of errors."""
    said = []
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == status, errors[-2000:]
            said.append(errors)
        return said
    finally:
        for process in processes:  # one that failed leaves the other waiting for it
            process.kill()
            process.communicate()
