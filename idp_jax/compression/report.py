"""A picture of what compression did to every layer.

The report itself is the JSON beside the model (`compression.json`), one row for every matrix.
"""

from pathlib import Path
from typing import Any

import numpy as np


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draws the relative output error of every matrix over the layers, and its baseline's.

    Args:
        rows: from `driver.compress`; nothing is drawn where none has an error.
        path: the PNG to write.
    """
    # Without pyplot, which would take longer to import than this takes to draw.
    from matplotlib.figure import Figure

    measured = [row for row in rows if "relative_error" in row]
    if not measured:
        return
    names = list(dict.fromkeys(row["matrix"] for row in measured))
    figure = Figure(figsize=(2.3 * len(names) + 1, 3.2), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True)
    figure.suptitle(title)
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        matching = [row for row in measured if row["matrix"] == name]
        layers = [row["layer"] for row in matching]
        if all("baseline_error" in row for row in matching):
            baselines = [row["baseline_error"] for row in matching]
            axis.plot(layers, baselines, ".-", color="#a9c9d9", label="baseline")
        errors = [row["relative_error"] for row in matching]
        axis.plot(layers, errors, ".-", color="#2a6f97", label="compressed")
        axis.set(title=name, xlabel="layer")
        axis.spines[["top", "right"]].set_visible(False)
    first = np.atleast_1d(axes)[0]
    first.set_ylabel("relative output error")
    # The axis is shared; errors that are all 0 have no logarithm.
    first.set_yscale("log" if any(row["relative_error"] for row in measured) else "linear")
    first.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=120, format="png")
