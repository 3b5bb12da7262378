"""The registered ops: schema, shape inference, gradient, and the choice of backend, one module per op."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastsparse._exports import of_modules

if TYPE_CHECKING:  # what reads this without running it

    def __getattr__(op: str) -> Callable: ...


_ops = of_modules(__name__, __path__)
globals().update(_ops)
__all__ = sorted(_ops)
