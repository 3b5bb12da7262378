"""The definition of every op in plain PyTorch: the oracle of all tests, differentiated by PyTorch itself.

Nothing here is fast. Where a kernel and its reference disagree, the reference is right.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastsparse._exports import of_modules

if TYPE_CHECKING:  # what reads this without running it

    def __getattr__(definition: str) -> Callable: ...


_definitions = of_modules(__name__, __path__)
globals().update(_definitions)
__all__ = sorted(_definitions)
