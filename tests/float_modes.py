"""Modes of the floating-point unit, of which every thread has its own."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# FE_UPWARD, FE_DOWNWARD and FE_TOWARDZERO of fenv.h.
_DIRECTIONS = {"nearest": 0, "up": 0x400000, "down": 0x800000, "zero": 0xC00000}
if platform.machine() != "aarch64":
    _DIRECTIONS = {"nearest": 0, "up": 0x800, "down": 0x400, "zero": 0xC00}

# Subnormal numbers as zeros, and where sums and products are rounded to.
FLOAT_MODES = ("flushed nearest", "kept up", "kept down", "kept zero", "flushed up")
ORDINARY = "kept nearest"


def current_mode() -> str:
    """The calling thread's."""
    flushes = bool(torch.tensor([1e-40]).mul(1) == 0)
    direction = ctypes.CDLL(None).fegetround()
    return f"{'flushed' if flushes else 'kept'} {next(k for k, v in _DIRECTIONS.items() if v == direction)}"


@contextmanager
def float_mode(mode: str) -> Iterator[None]:
    """The calling thread in one of FLOAT_MODES, or in the ordinary one."""
    subnormals, direction = mode.split()
    try:
        torch.set_flush_denormal(subnormals == "flushed")
        ctypes.CDLL(None).fesetround(_DIRECTIONS[direction])
        yield
    finally:
        ctypes.CDLL(None).fesetround(0)
        torch.set_flush_denormal(False)
