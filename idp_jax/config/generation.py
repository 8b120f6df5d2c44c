"""The settings of `idp-jax generate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from idp_jax.config.groups import ConfigError, Loading, Mesh, Settings, at_least
from idp_jax.config.marks import Positional
from idp_jax.config.places import check_apart


@dataclass(frozen=True)
class Sampling(Settings):
    """How tokens are picked, and what ends a text."""

    words: ClassVar[tuple[str, ...]] = ("stop",)

    max_new_tokens: int = 128
    """Tokens of a text at most."""
    temperature: float = 0.0
    """0 takes the likeliest token; above 0 tokens are drawn by chance."""
    top_k: int | None = None
    """Draw among so many likeliest tokens."""
    top_p: float | None = None
    """Draw among the fewest tokens that have this probability together."""
    stop: tuple[str, ...] = ()
    """Strings before which a text ends."""
    seed: int = 0
    """Of drawing: a prompt and a seed give one text."""

    def __post_init__(self):
        super().__post_init__()
        at_least("max-new-tokens", self.max_new_tokens, 1)
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature} must be 0 or more")
        if self.top_k is not None:
            at_least("top-k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p} must be above 0 and at most 1")
        for name, value in (("top-k", self.top_k), ("top-p", self.top_p)):
            if value is not None and self.temperature == 0:
                raise ConfigError(
                    f"--{name} {value} limits what is drawn by chance, and --temperature 0 draws "
                    "nothing; give one above 0, such as 0.7"
                )
        if "" in self.stop:
            raise ConfigError("--stop '' ends every text at once; give a string, or leave it out")


@dataclass(frozen=True, kw_only=True)
class Generate(Sampling, Loading):
    """Continue a prompt, shown as the text comes, or a file of prompts."""

    words: ClassVar[tuple[str, ...]] = ("stop", "prompt")

    model: Positional[str]
    """Hub name, model folder, GGUF file or compressed folder."""
    prompt: str | None = None
    """What is continued."""
    prompts: Path | None = None
    """Many prompts: a .txt file, one a line, or .jsonl: {"prompt": ...} or {"messages": [...]}."""
    chat: bool = False
    """Take each prompt for a user's message, and put it into the tokenizer's chat template."""
    adapter: Path | None = None
    """Folder of a PEFT adapter or of a pool."""
    selector: str | None = None
    """How the pool's prompt is chosen instead of the pool's own way."""
    out: Path | None = None
    """The texts, a .jsonl file, one line for each prompt."""
    overwrite: bool = False
    """Replace `out` if it holds such texts."""
    batch_size: int = 4
    """Rows that are decoded together; one that has ended makes room for the next prompt."""
    mesh: Mesh = field(default_factory=Mesh)
    """Devices that share the model; all of one process."""

    def __post_init__(self):
        super().__post_init__()
        at_least("batch-size", self.batch_size, 1)
        if (self.prompt is None) == (self.prompts is None):
            raise ConfigError("give either --prompt TEXT or --prompts FILE")
        if self.prompt is not None and not self.prompt:
            raise ConfigError("--prompt '' is empty; give text to continue")
        if self.prompts is not None and self.out is None:
            raise ConfigError(f"--prompts {self.prompts} needs a file for the texts: --out")
        if self.selector is not None and self.adapter is None:
            raise ConfigError(f"--selector {self.selector} needs a pool: give its --adapter")
        if self.mesh.distributed:
            raise ConfigError("--mesh.distributed: generate runs in one process; leave it out")
        read = {"model": self.model, "adapter": self.adapter, "prompts": self.prompts}
        check_apart(self.out, read)
