"""What a compressed weight says of itself, so that the shared files need not know its kind.

Invariant: a new kind of weight is a dataclass with these members, registered with JAX; dispatch.py,
stack.py and sharded.py then take it as it is.
"""

from typing import Any, ClassVar, Protocol

import jax


class Weight(Protocol):
    """A compressed matrix [I, O]; one that reorders its inputs has `order` too, int32 [I]."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def inputs(self) -> int:
        """I."""
        ...

    @property
    def outputs(self) -> int:
        """O."""
        ...

    @property
    def groups(self) -> int:
        """G, the runs of inputs that share a row of `grid`."""
        ...

    @property
    def grid(self) -> jax.Array | None:
        """Scales and zeros, int32 [..., rows, O] (see codes.py), or None where there are none."""
        ...

    @property
    def arrangement(self) -> str:
        """The order of its words, "rows" or "fragments"; see `dispatch.arrangement_of`."""
        ...

    @property
    def axes(self) -> dict[str, tuple[int | None, int]]:
        """The axes of every array that stores the matrix, by the name of its field.

        The axis of the inputs (None where all inputs share what the array says) and that of the
        outputs, both counted from the end: layers may be stacked in front.
        """
        ...

    @property
    def tile(self) -> tuple[int, int]:
        """Inputs and outputs that lie together: a part of the weight has whole ones."""
        ...

    @property
    def layer(self) -> jax.Array | None:
        """Which layer is meant, int32 scalar, where the arrays are stacks (see stack.py)."""
        ...
