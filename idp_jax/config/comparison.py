"""The settings of a comparison of runs that are done, and of what runs could show."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from idp_jax.config.groups import ConfigError, Settings, at_least
from idp_jax.config.marks import Positional
from idp_jax.config.places import check_apart

TABLES = (".md", ".tex", ".csv")


@dataclass(frozen=True, kw_only=True)
class Compare(Settings):
    """Test whether runs differ on the same items, or plan a test.

    Runs are results of eval, demo or the like, and samples of lm_eval.
    """

    words: ClassVar[tuple[str, ...]] = ("power", "metric", "cluster", "tasks")

    runs: Positional[tuple[str, ...]] = ()
    """The baseline, then what is compared with it: files of results (FILE:VARIANT for one of
    several, FILE alone for all of them), samples_*.jsonl, or folders of these."""
    out: Path | None = None
    """The comparisons, a JSON file."""
    table: tuple[Path, ...] = ()
    """The table, as Markdown (.md), LaTeX (.tex) or CSV (.csv)."""
    overwrite: bool = False
    """Replace `out` if it holds results, and tables."""
    tasks: str = ""
    """Tasks to compare, separated by commas; by default all."""
    metric: str | None = None
    """What is compared, such as acc_norm; by default acc or exact_match, or else the first."""
    cluster: str | None = None
    """A field of the documents, such as relation: items that share its value count together."""
    margin: float = 2.0
    """Points below which a difference does not matter; "equivalent" is said of this."""
    power: tuple[str, ...] = ()
    """No runs yet: what these items could show, as 450, NAME=450 or, with --task-data, a task."""
    task_data: Path | None = None
    """Folder with a local copy of every task's data, for --power."""
    discordance: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.3)
    """Shares of items that the two models will not both have right or both wrong, for --power."""
    seed: int = 0
    """Of the items that are drawn again."""

    def __post_init__(self):
        super().__post_init__()
        if bool(self.runs) == bool(self.power):
            raise ConfigError("give runs to compare, or --power before there are any, not both")
        at_least("margin", self.margin, 0.01)
        if self.margin > 100:
            raise ConfigError(f"--margin {self.margin} is in points: give at most 100")
        for share in self.discordance:
            if not 0 < share <= 1:
                raise ConfigError(f"--discordance {share} is no share above 0, and at most 1")
        for file in self.table:
            if file.suffix not in TABLES:
                raise ConfigError(f"--table {file} must end in {', '.join(TABLES)}")
        if self.power and self.out:
            raise ConfigError("--power compares nothing, so there is no --out; give --table")
        for run in self.runs:
            for file in filter(None, (self.out, *self.table)):
                check_apart(file, {"run": run, "file": run.partition(":")[0]})
