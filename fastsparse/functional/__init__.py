"""What users call: validation, autocast and leading batch dimensions around the ops, a module per family."""

# ruff: noqa: F403 - a family says in its __all__ what is exported
from fastsparse.functional import (
    codes,
    interactions,
    jumps,
    newton,
    polynomials,
    pursuit,
    recurrences,
    sparse_codes,
)  # fmt: skip
from fastsparse.functional.codes import *
from fastsparse.functional.interactions import *
from fastsparse.functional.jumps import *
from fastsparse.functional.newton import *
from fastsparse.functional.polynomials import *
from fastsparse.functional.pursuit import *
from fastsparse.functional.recurrences import *
from fastsparse.functional.sparse_codes import *

__all__: list[str] = []
__all__ += codes.__all__
__all__ += interactions.__all__
__all__ += jumps.__all__
__all__ += newton.__all__
__all__ += polynomials.__all__
__all__ += pursuit.__all__
__all__ += recurrences.__all__
__all__ += sparse_codes.__all__
