"""Which matrices of which layers a LoRA updates, and with what rank and alpha."""

from collections.abc import Sequence
from typing import NamedTuple

from idp_jax.config import Lora
from idp_jax.config.files import from_dict
from idp_jax.config.rules import rules_by_name
from idp_jax.models.config import ModelConfig
from idp_jax.models.matrices import Matrix, matrices
from idp_jax.models.names import module_names

ALL = "all"
_SETTINGS = ("rank", "alpha")


class Ranks(NamedTuple):
    """One matrix' rank (0: no update) and alpha."""

    rank: int
    alpha: float


def ranks_of(
    config: ModelConfig, common: Ranks, targets: Sequence[str], rules: Sequence[str] = ()
) -> dict[Matrix, list[Ranks]]:
    """The updates of every matrix that has one in some layer.

    Args:
        common: of the targets.
        targets: names of matrices, updated in every layer; "all" stands for every one.
        rules: see `config.rules`; of rank and alpha. A matrix to which a rule gives something is
            updated, be it a target or not.

    Returns:
        matrix -> what every layer has, in the order in which the matrices are used.

    Raises:
        ValueError: a target or rule that fits no matrix, a rank below 1, or nothing to update.
    """
    known = {matrix.name: matrix for matrix in matrices(config)}
    unknown = [name for name in targets if name not in (*known, ALL)]
    if unknown:
        raise ValueError(f"no matrix {unknown[0]!r} for LoRA; this model has {', '.join(known)}")
    if common.rank < 1:
        raise ValueError(f"LoRA rank {common.rank} must be at least 1")
    names = module_names(config)
    by_name = rules_by_name(rules, list(names.values()), "--lora.rules", _SETTINGS)
    kinds: dict[str, Ranks] = {}
    for rule in by_name.values():
        if rule is not None and rule.changes is not None and rule.label not in kinds:
            read = from_dict(Lora, {**common._asdict(), **rule.changes}, rule.label)
            kinds[rule.label] = Ranks(read.rank, read.alpha)
    nothing = Ranks(0, common.alpha)
    found: dict[Matrix, list[Ranks]] = {matrix: [] for matrix in known.values()}
    for (_, name), module in names.items():
        rule, target = by_name[module], name in targets or ALL in targets
        if rule is None:
            found[known[name]].append(common if target else nothing)
        else:
            found[known[name]].append(nothing if rule.changes is None else kinds[rule.label])
    found = {m: layers for m, layers in found.items() if any(layer.rank for layer in layers)}
    if not found:
        raise ValueError(f"LoRA needs at least one matrix; this model has {', '.join(known)}")
    return found
