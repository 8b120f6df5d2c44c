"""What the command line reads of a setting beside its type: its place, or that it has no option.

Settings can be made in Python without tyro, which the command line alone needs: the marks mean
nothing there.
"""

from typing import TYPE_CHECKING, Annotated, TypeVar

if TYPE_CHECKING:
    from tyro.conf import Positional, Suppress
else:
    try:
        from tyro.conf import Positional, Suppress
    except ModuleNotFoundError:
        Positional = Suppress = Annotated[TypeVar("T"), None]

__all__ = ["Positional", "Suppress"]
