"""Repairs: small trained parts that are put beside a frozen model.

Each `adapter.repair(decoder)` gives a `Repaired`, which is called like the model itself.
"""

from idp_jax.recover.lora import LoraAdapter, MaskedLora
from idp_jax.recover.norms import NormsAndBiases
from idp_jax.recover.pool import Pool
from idp_jax.recover.prefix import PrefixAdapter
from idp_jax.recover.prompt import SoftPrompt
from idp_jax.recover.repaired import Repaired
from idp_jax.recover.selection import find_selector
from idp_jax.recover.selectors import SELECTORS, ScoreInputs, Selector

__all__ = [
    "SELECTORS",
    "LoraAdapter",
    "MaskedLora",
    "NormsAndBiases",
    "Pool",
    "PrefixAdapter",
    "Repaired",
    "ScoreInputs",
    "Selector",
    "SoftPrompt",
    "find_selector",
]
