"""Repairs: small trained parts that are put beside a frozen model. Each `adapter.repair(decoder)`
gives a `Repaired`, which is called like
the model itself."""

from idp_jax.recover.adapters import LoraAdapter, Pool, PrefixAdapter, SoftPrompt
from idp_jax.recover.peft import load_adapter, save_adapter
from idp_jax.recover.repaired import Repaired

__all__ = [
    "LoraAdapter",
    "Pool",
    "PrefixAdapter",
    "Repaired",
    "SoftPrompt",
    "load_adapter",
    "save_adapter",
]
