"""What an adapter may be made of before it is trained."""

from typing import NamedTuple

import jax

from idp_jax.models.decoder import Decoder


class Start(NamedTuple):
    """What the beginning of a training has at hand; a method takes what it needs.

    Attributes:
        key: a random key of this training's own.
        text: int32 [n], tokens of the text that a prompt or prefix may begin with, or None.
        teacher: the uncompressed model, where there is one.
        windows: int32 [N, T], training text, or None.
    """

    key: jax.Array
    text: jax.Array | None = None
    teacher: Decoder | None = None
    windows: jax.Array | None = None
