"""Gated recurrences in Triton: which solver, and how it is launched.

What solvers do stands in fastsparse/reference/_solvers.py.
"""

from functools import cache

import torch
import triton
from fastsparse.kernels._cells import STATES
from fastsparse.kernels._launch import INTERPRETED, OPTIONS, WARP
from fastsparse.kernels._recurrence_solvers import newton, sequential, shooting
from fastsparse.kernels._sequences import sequences
from torch import Tensor

from fastsparse._options import NEWTON_PASSES, SHOOTING_PASSES, SOLVERS, option_at

# How solvers are laid out: channels a program, warps, and what else their kernels must know. The parallel
# ones have channels enough for whole sectors of memory, of 32 bytes, also of halves, and two elements a
# thread; compilers that strive for more warps spill registers, hence their number (AMD's has no such option).
# The interpreter's time goes by operations, not by elements.
SEQUENTIAL = {"BLOCK": WARP, "AHEAD": 8, "num_warps": 1}
NEWTON = {"BLOCK": 16, "STEPS": 64, "PASSES": NEWTON_PASSES, "num_warps": 16, "maxnreg": 128}
SHOOTING = {
    "BLOCK": 16,
    "CHUNKS": 16,
    "STEPS": 64,
    "PASSES": SHOOTING_PASSES,
    "num_warps": 128 // WARP,
    "maxnreg": 240,
}
if WARP == 64:  # AMD's compiler refuses an option that it doesn't have
    del NEWTON["maxnreg"], SHOOTING["maxnreg"]
if INTERPRETED:
    SEQUENTIAL |= {"BLOCK": 64, "AHEAD": 2}
    NEWTON |= {"BLOCK": 64}
    SHOOTING |= {"BLOCK": 64, "STEPS": 16}


def gated_recurrence(
    cell: str,
    u: Tensor,
    weight: Tensor,
    peephole: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    cu_seqlens: Tensor | None,
    position: int,
) -> tuple[Tensor, ...]:
    """h (B, T, H), of a cell of two states also c, and passes (S, H). Nothing here waits for the device."""
    solver = option_at(f"{cell}_recurrence", "solver", position, SOLVERS)
    B, T, _, H = u.shape
    h, passes = u.new_empty(B, T, H), u.new_empty(sequences(u, cu_seqlens), H, dtype=torch.int32)
    c = torch.empty_like(h) if STATES[cell] == 2 else None
    small = [None if part is None else part.contiguous() for part in (weight, peephole, h0, c0, cu_seqlens)]
    channels, sizes = passes.numel(), (T, H, *u.stride())

    def launch(kernel, layout: dict, **more: int) -> None:
        grid = (triton.cdiv(channels, layout["BLOCK"]),)
        kernel[grid](u, *small, h, c, passes, channels, *sizes, CELL=cell, **more, **layout, **OPTIONS)

    if solver == "auto":
        solver = fastest(channels, T, _multiprocessors(u.device))
    if h.numel() == 0 or solver == "sequential":
        passes.zero_()
    if h.numel() > 0:
        if solver != "sequential":
            launch(*((newton, NEWTON) if solver == "newton" else (shooting, SHOOTING)))
        launch(sequential, SEQUENTIAL, below=int(solver == "sequential"))
    return (h, passes) if c is None else (h, c, passes)


def fastest(channels: int, T: int, multiprocessors: int) -> str:
    """The solver that ``auto`` takes, by an estimate: no GPU has been measured.

    Step by step takes T times some 200 clocks, if no multiprocessor has more than a dozen warps, of 32
    channels each. Shooting takes some 80 clocks for every step of 32 channels on a multiprocessor: three
    passes and the last, of 60 to 100 instructions, four of which are issued a clock; so it is ahead where a
    multiprocessor has less than two warps' channels. And some 7000 clocks however short time is. Newton's
    method needs as many passes, and a scan of all steps in each.
    """
    return "shooting" if channels < 64 * multiprocessors and T >= 128 else "sequential"


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # under the interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
