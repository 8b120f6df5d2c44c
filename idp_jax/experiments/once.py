"""Steps of any experiment that leave their result in a file, and are not done again.

The invariant: a result that is there is taken only if it is of the same settings and the same
inputs, and as it was written.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from idp_jax.compression.job import compress
from idp_jax.config import Compress, ConfigError
from idp_jax.config.files import to_dict
from idp_jax.evaluation.results import Results, VariantResult, read, write
from idp_jax.jobs.files import read_json, seal
from idp_jax.jobs.folder import differences
from idp_jax.jobs.machine import describe
from idp_jax.jobs.marker import changed
from idp_jax.jobs.progress import Progress

_DIGEST = "digest"  # of the numbers, beside what was asked


def check_unchanged(folder: Path) -> None:
    """Refuses a finished step's folder where a file is missing, or is not the one written."""
    file = changed(folder)
    if file is not None:
        raise ConfigError(
            f"{folder / file} is not as this experiment wrote it; remove {folder}, and the same "
            "command makes it again"
        )


def compress_once(job: Compress, progress: Progress) -> None:
    """Compresses a model, unless its folder is there.

    Raises:
        ConfigError: the folder is of other settings, or was changed.
    """
    if job.out is None or not job.out.is_dir():
        compress(job, progress=progress)
        return
    check_unchanged(job.out)
    remedy = f"remove {job.out}, and the same command makes it again"
    report = read_json(job.out / "compression.json", remedy)
    if differences(report.get("config"), to_dict(job), ("out",)):
        raise ConfigError(f"{job.out} is of other settings; {remedy}")


def measure_once(
    file: Path, asked: dict[str, Any], measure: Callable[[], list[VariantResult]]
) -> list[VariantResult]:
    """What an earlier call measured, if it is whole and the same was asked; else it is measured.

    Args:
        file: of results.
        asked: what tells these numbers from others: settings, and fingerprints of what they are of.
    """
    try:
        results = read(file)
        known = {**asked, _DIGEST: _digest(results.variants)}
        if results.variants and not differences(results.config, known, ()):
            return results.variants
    except ConfigError:
        pass  # none yet, or damaged
    whole = Results(config=asked, environment=describe(), variants=measure())
    write(whole, file)
    found = read(file).variants  # as the next call will see them
    write(replace(whole, config={**asked, _DIGEST: _digest(found)}), file)
    return found


def _digest(variants: list[VariantResult]) -> str:
    return seal([asdict(variant) for variant in variants])
