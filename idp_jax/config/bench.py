"""The settings of `idp-jax bench`."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, get_args

from idp_jax.config.choices import ChipName, Repair
from idp_jax.config.groups import ConfigError, Loading, Mesh, at_least, one_of
from idp_jax.config.marks import Positional
from idp_jax.config.places import check_apart
from idp_jax.config.recovery import Lora

_METHODS: tuple[Repair, ...] = ("prompt", "prefix", "idp", "lora")


@dataclass(frozen=True, kw_only=True)
class Bench(Loading):
    """Time models and their repairs, in turns; parameters and bytes.

    Without --adapters fresh ones are made: times do not depend on their numbers.
    """

    urls: ClassVar[tuple[str, ...]] = ("model", "compressed")

    model: Positional[str]
    """Hub name, model folder or GGUF file; for --plan a folder with a config.json is enough."""
    compressed: tuple[str, ...] = ()
    """The same model compressed, in one or several ways."""
    adapters: dict[str, Path] = field(default_factory=dict)
    """Trained adapters, a name and a folder each; they stand beside every model in turn."""
    methods: tuple[Repair, ...] | None = None
    """Fresh adapters; by default prompt prefix idp lora where there are no --adapters."""
    soft_prompt_length: int = 100
    """Tokens of a fresh prompt or prefix."""
    pool_lengths: tuple[int, ...] = (25, 100)
    """Tokens of each prompt of a fresh pool."""
    lora: Lora = field(default_factory=Lora)
    """A fresh LoRA."""
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    """Rows generated together."""
    prompt_length: int = 128
    """Tokens of the text of a row; a soft prompt comes on top."""
    new_tokens: int = 32
    """Tokens generated for each row, the first of which comes with the text."""
    repeats: int = 10
    """Timed rounds; each goes once through everything, in an order of its own."""
    warmup: int = 1
    """Rounds before these, which are not counted; the first compiles."""
    plan: bool = False
    """Say parameters, bytes and the roofline from config.json alone, and stop."""
    chip: ChipName | None = None
    """Whose roofline --plan gives; by default this machine's."""
    out: Path | None = None
    """The results, a JSON file; beside it goes a figure of the same name, .png."""
    table: Path | None = None
    """A file for the same tables in Markdown."""
    overwrite: bool = False
    """Replace `out` if it holds a bench, its figure, and the table."""
    seed: int = 0
    """Of prompts, fresh adapters, the order in every round and resampled intervals."""

    def __post_init__(self):
        super().__post_init__()
        for entry in fields(self):
            if entry.type is int and entry.name != "seed":
                least = 2 if entry.name == "new_tokens" else 1
                at_least(entry.name.replace("_", "-"), getattr(self, entry.name), least)
        for name in ("batch_sizes", "pool_lengths"):
            option, values = name.replace("_", "-"), getattr(self, name)
            if not values or min(values) < 1:
                raise ConfigError(f"--{option} {values} must name at least one number above 0")
        for method in self.methods or ():
            one_of("methods", method, get_args(Repair))
        for name in ("compressed", "batch_sizes", "methods"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} names one twice: {' '.join(map(str, values))}")
        if self.mesh != Mesh():
            raise ConfigError("--mesh: times are of one device; leave it out")
        if self.chip is not None and not self.plan:
            raise ConfigError(f"--chip {self.chip} is of --plan; times are of this machine")
        if self.out is None and not self.plan:
            raise ConfigError("--out is missing: give a file such as bench.json, or --plan")
        self._check_places()

    def _check_places(self) -> None:
        read = {"model": self.model, **{f"adapter {n}": p for n, p in self.adapters.items()}}
        read |= {f"compressed model {path}": path for path in self.compressed}
        check_apart(self.out, read)
        check_apart(self.table, read)
        if self.out is not None and self.out.suffix == ".png":
            raise ConfigError(
                f"--out {self.out} is the figure's name; give a file such as bench.json"
            )
        if self.table is not None and self.table in (self.out, self.figure):
            raise ConfigError(f"--table {self.table} is the place of another result; give another")

    @property
    def models(self) -> tuple[str, ...]:
        """The model and those that were made of it."""
        return (self.model, *self.compressed)

    @property
    def made(self) -> tuple[Repair, ...]:
        """The methods of fresh adapters."""
        if self.methods is not None:
            return self.methods
        return () if self.adapters else _METHODS

    @property
    def figure(self) -> Path | None:
        """Where the figure goes."""
        return None if self.out is None else self.out.with_suffix(".png")
