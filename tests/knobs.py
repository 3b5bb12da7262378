"""What tests turn and read in the compiled libraries: csrc/cpu/edge/knobs.h, csrc/cuda/knobs.h, by name."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager


def _structure(*names: str) -> type[ctypes.Structure]:
    return type("Knobs", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_int64) for name in names]})


_KNOBS = {
    "fastsparse_cpu_knobs": _structure("screening", "fused", "strassen", "kept_atoms", "free_bytes"),
    "fastsparse_cuda_knobs": _structure(
        *("screening", "rows", "bytes", "threads", "shared_bytes", "accumulation", "counts", "undecided"),
        "capturing",
    ),
}


def knobs(library: ctypes.CDLL) -> ctypes.Structure:
    """The knobs themselves, of the CPU's library or of CUDA's."""
    name = next(name for name in _KNOBS if hasattr(library, name))
    accessor = getattr(library, name)
    accessor.restype = ctypes.POINTER(_KNOBS[name])
    return accessor().contents


def turn(library: ctypes.CDLL, **values: int) -> None:
    """Turn some knobs for good."""
    for name, value in values.items():
        setattr(knobs(library), name, value)


@contextmanager
def turned(library: ctypes.CDLL, **values: int) -> Iterator[None]:
    """Turn some knobs, and back in the end."""
    before = {name: getattr(knobs(library), name) for name in values}
    try:
        turn(library, **values)
        yield
    finally:
        turn(library, **before)
