"""How kernels of recurrences are laid over sequences: a program has one, and a block of channels.

It goes through time tile by tile, all steps of a tile at once, the next tiles on their way.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from fastsparse.kernels._launch import INTERPRETED
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of inputs; states are fp32


@triton.jit
def line_of(cu_seqlens, s, T):
    """Where sequences lie, one or many: in which row, from which step on, and for how many.

    Bounds that nobody has checked go nowhere outside.
    """
    if cu_seqlens is None:
        row, begin, end = s, s * 0, s * 0 + T
    else:
        row, begin = s * 0, tl.minimum(tl.maximum(tl.load(cu_seqlens + s), 0), T)
        end = tl.maximum(tl.minimum(tl.load(cu_seqlens + s + 1), T), begin)
    return row, begin, end - begin


@triton.jit
def sequence_of(cu_seqlens, T, H, BLOCK_H: tl.constexpr):
    """The program's sequence s, the row it lies in, its first step there, its length, and channels (1, .)."""
    blocks = tl.cdiv(H, BLOCK_H)
    s = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    row, begin, length = line_of(cu_seqlens, s, T)
    return s, row, begin, length, channel


@triton.jit
def place_of(step, begin, length, REVERSE: tl.constexpr):
    """Where steps lie in time, by their numbers in the recurrence's order."""
    return begin + (length - 1 - step if REVERSE else step)


@triton.jit
def load_or_zeros(state, place, real):
    """What is at places of states, or zeros where there are none, in fp32."""
    loaded = tl.zeros(place.shape, tl.float32)
    if state is not None:
        loaded = tl.load(state + place, mask=real, other=0.0).to(tl.float32)
    return loaded


@dataclass(frozen=True)
class Tile:
    """Steps and channels of a tile, and the warps of a program, which has one after the other."""

    steps: int
    channels: int
    warps: int

    @property
    def options(self) -> dict[str, int]:
        """As kernels take them, with how many tiles are loaded or worked on at once."""
        return {"BLOCK_T": self.steps, "BLOCK_H": self.channels, "STAGES": 4, "num_warps": self.warps}

    def programs(self, S: int, H: int) -> int:
        return S * triton.cdiv(H, self.channels)


def tile_of(tile: Tile, T: int) -> Tile:
    """The tile, no longer than time is."""
    if INTERPRETED:
        return Tile(32, 32, 1)
    return replace(tile, steps=min(tile.steps, triton.next_power_of_2(max(1, T))))


def sequences(batch: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many there are in a batch (B, T, ...)."""
    return batch.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
