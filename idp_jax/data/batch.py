"""What a training step is given."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Rows of text, and what an objective may need beside them.

    Attributes:
        tokens: int32 [B, T].
        segments: int32 [B, T], the document that each token belongs to, or None: every row is one
            text.
        loss_mask: bool [B, T], tokens that count as targets, or None: all do.
        teacher: what the uncompressed model says of these tokens, in the objective's own form, or
            None.
    """

    tokens: Any
    segments: Any = None
    loss_mask: Any = None
    teacher: Any = None
