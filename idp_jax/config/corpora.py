"""The text of a comparison: what is trained on, what chooses and what is reported."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from idp_jax.config.groups import Settings, at_least


@dataclass(frozen=True)
class Corpora(Settings):
    """Text that is trained on, chooses and is reported. No document serves two purposes."""

    section: ClassVar[str] = "data."

    train: str
    """What everything is calibrated and trained on: a .txt or .jsonl file, or hub:NAME[:CONFIG]."""
    held_out: Path
    """A .jsonl file; some of its documents choose learning rates and steps, others are reported."""
    second: Path | None = None
    """Text of another kind (.txt, .raw, .jsonl), such as WikiText-2; what it loses is forgotten."""
    sequence_length: int = 256
    """Tokens of every window."""
    calibration_windows: int = 64
    """Windows that a compression is calibrated on."""
    choosing_windows: int = 16
    """Windows whose loss chooses the learning rate of a recipe, and the best step of a training."""
    reported_windows: int = 64
    """Windows that perplexities are reported on; as many of the second text."""

    def __post_init__(self):
        super().__post_init__()
        at_least("data.sequence-length", self.sequence_length, 2)
        for name in ("calibration_windows", "choosing_windows"):
            at_least(f"data.{name.replace('_', '-')}", getattr(self, name), 1)
        at_least("data.reported-windows", self.reported_windows, 2)  # one has no interval
