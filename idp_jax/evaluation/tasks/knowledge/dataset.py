"""Gives lm-evaluation-harness the knowledge probe's data.

The harness resolves a relative `data_files` against the current directory; this reads the file
beside itself instead, so the tasks work from anywhere. Invariant: no network and no cache files.
"""

import json
from pathlib import Path

from datasets import Dataset


def load_domain(domain: str, **_task_metadata: object) -> dict[str, Dataset]:
    """Reads one domain of the probe.

    Args:
        domain: Name of a `<domain>.jsonl` file beside this module.
        **_task_metadata: The task's metadata, which the harness passes along; unused.

    Returns:
        The split "test", with columns id, context, choices (4 strings) and answer (index of the
        right choice).

    Raises:
        ValueError: If there is no such domain.
    """
    path = Path(__file__).with_name(f"{domain}.jsonl")
    if not path.is_file():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.jsonl")))
        raise ValueError(f"unknown knowledge domain {domain!r}: choose one of {known}")
    lines = path.read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
