"""The order of the data: an endless, shuffled stream of tokens that is a function of the seed alone.

Every epoch permutes the blocks (``block_tokens`` neighbouring rows of a shard) of all shards, fills buffers
of about ``buffer_tokens`` with them in that order, and permutes the rows of each buffer. Neighbours of a text
come apart as far as the buffer is large; no token is left out or repeated within an epoch; batches run on
across the ends of buffers and epochs. Nothing is drawn from a generator with a past, so any position is
reached at once: resuming needs the number of tokens consumed and no more.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fastsparse.train.shards import Shards

_BLOCKS, _ROWS = 0, 1  # which permutation a generator is for


class TokenStream:
    """Batches of shuffled tokens.

    Args:
        shards: the activations.
        targets: others of the same tokens, row by row, that come along with them; None where there are none.
        seed: of every permutation.
        block_tokens: rows that are read together.
        buffer_tokens: rows that are shuffled together; while one buffer is used the next one is read.
    """

    def __init__(
        self,
        shards: Shards,
        targets: Shards | None = None,
        *,
        seed: int,
        block_tokens: int,
        buffer_tokens: int,
    ) -> None:
        self._shards = shards
        self._sides = (shards,) if targets is None else (shards, targets)
        self._seed = seed
        self._block_tokens = block_tokens
        self._blocks_per_buffer = max(1, buffer_tokens // block_tokens)
        blocks = [-(-shard.rows // block_tokens) for shard in shards.shards]
        self._first_block = np.concatenate([[0], np.cumsum(blocks)])  # of every shard, and the total

    def batches(self, batch_size: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield batches from token ``start`` of the stream on, without end.

        Yields:
            Rows of the shards, (batch_size, D) or (batch_size, L, D) in their dtype, and those of the targets
            where there are any.
        """
        buffers = self._buffers(start)
        buffer, used = next(buffers), 0
        while True:
            parts, wanted = [], batch_size
            while wanted:
                if used == len(buffer[0]):
                    buffer, used = next(buffers), 0
                taken = tuple(rows[used : used + wanted] for rows in buffer)
                parts.append(taken)
                used += len(taken[0])
                wanted -= len(taken[0])
            yield parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))

    def _buffers(self, start: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield shuffled buffers, reading one ahead; the first begins at token ``start``."""
        with ThreadPoolExecutor(1, thread_name_prefix="fastsparse-read") as reader:
            plans = self._plans(start)
            ahead = reader.submit(self._load, *next(plans))
            while True:
                buffer = ahead.result()
                ahead = reader.submit(self._load, *next(plans))
                yield buffer

    def _plans(self, start: int) -> Iterator[tuple[int, int, np.ndarray, int]]:
        """Yield (epoch, buffer, its blocks, rows to skip) from token ``start`` on."""
        epoch, skip = divmod(start, self._shards.rows)
        while True:
            order = self._generator(_BLOCKS, epoch, 0).permutation(self._first_block[-1])
            ends = np.cumsum(self._sizes(order))
            for buffer, begin in enumerate(range(0, len(order), self._blocks_per_buffer)):
                blocks = order[begin : begin + self._blocks_per_buffer]
                end = ends[begin + len(blocks) - 1]
                first = ends[begin - 1] if begin else 0
                if skip < end:
                    yield epoch, buffer, blocks, int(max(0, skip - first))
            epoch, skip = epoch + 1, 0

    def _load(self, epoch: int, buffer: int, blocks: np.ndarray, skip: int) -> tuple[Tensor, ...]:
        """Read a buffer's blocks, in the order of the disk, each row to its place in the shuffled buffer."""
        blocks = np.sort(blocks)
        sizes = self._sizes(blocks)
        ends = np.cumsum(sizes)
        places = self._generator(_ROWS, epoch, buffer).permutation(ends[-1])
        buffers = tuple(torch.empty(len(places), *side.shape, dtype=side.dtype) for side in self._sides)
        located = zip(self._shard_of(blocks), self._begin_of(blocks), sizes, ends, strict=True)
        for number, begin, size, end in located:
            for side, rows in zip(self._sides, buffers, strict=True):
                shard = side.shards[number]
                side.read(shard, int(begin), int(begin + size), rows, places[end - size : end])
        return tuple(rows[skip:] for rows in buffers)

    def _shard_of(self, blocks: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first_block, blocks, side="right") - 1

    def _begin_of(self, blocks: np.ndarray) -> np.ndarray:
        return (blocks - self._first_block[self._shard_of(blocks)]) * self._block_tokens

    def _sizes(self, blocks: np.ndarray) -> np.ndarray:
        """Rows of each block: the last one of a shard may be short."""
        rows = np.array([shard.rows for shard in self._shards.shards])[self._shard_of(blocks)]
        return np.minimum(self._block_tokens, rows - self._begin_of(blocks))

    def _generator(self, purpose: int, epoch: int, buffer: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, purpose, epoch, buffer])
