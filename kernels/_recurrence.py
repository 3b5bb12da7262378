"""Gated recurrences in Triton: which solver, and how it is launched.

What solvers do stands in fastsparse/reference/_solvers.py.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from fastsparse.kernels._launch import INTERPRETED, OPTIONS, WARP
from fastsparse.kernels._recurrence_newton import newton
from fastsparse.kernels._recurrence_sequential import sequential
from fastsparse.kernels._recurrence_shooting import shooting
from fastsparse.kernels._sequences import sequences
from torch import Tensor

from fastsparse._options import SOLVERS, option_at

NEWTON_PASSES = 12
SHOOTING_PASSES = 8

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


@dataclass(frozen=True)
class Problem:
    """A recurrence's inputs, checked, and room for its outputs: c and peephole of an LSTM alone."""

    u: Tensor
    weight: Tensor
    peephole: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    cu_seqlens: Tensor | None
    h: Tensor
    c: Tensor | None
    passes: Tensor

    @staticmethod
    def of(
        u: Tensor,
        weight: Tensor,
        peephole: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> "Problem":
        B, T, _, H = u.shape
        small = (
            None if part is None else part.contiguous() for part in (weight, peephole, h0, c0, cu_seqlens)
        )
        h = u.new_empty(B, T, H)
        c = None if peephole is None else torch.empty_like(h)
        # Which the parallel solvers fill in; of the sequential one they are none.
        return Problem(u, *small, h, c, u.new_empty(sequences(u, cu_seqlens), H, dtype=torch.int32))

    def launch(self, kernel, layout: dict, **more: int) -> None:
        _, T, _, H = self.u.shape
        channels = self.passes.numel()
        kernel[(triton.cdiv(channels, layout["BLOCK"]),)](
            self.u,
            self.weight,
            self.peephole,
            self.h0,
            self.c0,
            self.cu_seqlens,
            self.h,
            self.c,
            self.passes,
            channels,
            T,
            H,
            *self.u.stride(),
            **more,
            **layout,
            **OPTIONS,
        )

    def solve(self, op: str, position: int) -> None:
        """Fill in h, c and passes. Nothing here waits for the device."""
        solver = option_at(op, "solver", position, SOLVERS)
        if self.h.numel() == 0:
            self.passes.zero_()
            return
        if solver == "auto":
            solver = fastest(self.passes.numel(), self.u.shape[1], _multiprocessors(self.u.device))
        if solver == "newton":
            self.launch(newton, NEWTON)
        elif solver == "shooting":
            self.launch(shooting, SHOOTING)
        else:
            self.passes.zero_()
        self.launch(sequential, SEQUENTIAL, below=int(solver == "sequential"))


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
