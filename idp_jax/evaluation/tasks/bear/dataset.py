"""Gives lm-evaluation-harness the three templates of BEAR, from a local copy of its facts."""

from pathlib import Path

from datasets import Dataset

from idp_jax.evaluation.bear import bear_rows


def load_template(
    template: int, bear_data: str | None = None, **_task_metadata: object
) -> dict[str, Dataset]:
    """The facts in one template.

    Args:
        template: 0, 1 or 2.
        bear_data: folder with `facts.jsonl` and `relations.json`; the harness's own command line
            gives it by `--metadata bear_data=DIR`.
        **_task_metadata: the task's other metadata, which the harness passes along; unused.

    Returns:
        The split "test", see `bear_rows`.

    Raises:
        ValueError: there is no folder, or it cannot be used.
    """
    if bear_data is None:
        raise ValueError("its sentences are made from facts.jsonl and relations.json")
    return {"test": bear_rows(Path(bear_data), template).dataset()}
