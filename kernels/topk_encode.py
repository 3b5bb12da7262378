"""TopK encoding in Triton: a product whose epilogue filters, a collector of survivors, an exact select.

Latents are scored stripe by stripe. `score` is a matrix product that writes only what it must: of every
tile one bit a score, set where the score may still be among its row's k largest, and the scores of the set
bits. `collect` reads the bits (1/32 of the scores' bytes), appends the survivors to a bounded list a row,
in the order of their latents, and raises the row's bound to the exact k-th largest key seen. `select`
finds the rank of each of the k best by counting. The scores' matrix never exists, there is no atomic and no
sort.

Of a stripe that is a share s of the latents seen with it, about k s scores a row survive, a 32-byte sector
each; the bits of all scores are N M / 8 bytes. Both vanish beside the product's 2 N M D operations.

fp32 is screened in bf16 and refined exactly where that pays; else it is scored by FMAs. A row that the
screen can't decide is done again without it; which rows these are stays on the device.

The same call gives bitwise the same answer: the order of every sum is fixed by the shapes and the tile,
which the clock chooses once for every class of shapes. Nothing waits for the device, but that choice when
it is first made.
"""

from dataclasses import replace

import torch
import triton
from fastsparse.kernels._launch import INTERPRETED, OPTIONS, with_unit_stride
from fastsparse.kernels._order import UNSET, orders_of
from fastsparse.kernels._tensor_cores import accumulation_unit
from fastsparse.kernels._topk_lists import BLOCK, GIVEN_UP, Lists, collect, rivals_of, select
from fastsparse.kernels._topk_product import Atoms, Criteria, Tokens, score_stripe
from fastsparse.kernels._topk_screen import refine, round_rows
from torch import Tensor

from fastsparse._options import ACTIVATIONS, option_at

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Screening of fp32: by what pays (None), or for tests never (False) or wherever it is possible (True).
screening: bool | None = None

_MOST_TOKENS = 2048  # scored at a time: 16 tiles, so that a wave of tiles is about square
_MOST_SCREENED_TOKENS = 8192  # that share one rounding of the weight
_LEAST_SCORES, _MOST_SCORES = 2**22, 2**24  # of a stripe
_MOST_K = 1024  # beyond, PyTorch sorts
_MOST_CANDIDATES = 1536  # of a row in a screen; more make it undecided


class _Encoder:
    """One call: the arguments as kernels want them, and the ways to serve a block of tokens."""

    def __init__(self, x, weight, bias, k, activation, latent_scale, latent_mask) -> None:
        # Kernels count in 32 bits along a tile's columns.
        x, weight = (matrix if matrix.stride(1) < 2**24 else matrix.contiguous() for matrix in (x, weight))
        self.x, self.weight, self.k = x, weight, k
        (self.N, self.D), self.M = x.shape, weight.shape[0]
        self.absolute, self.relu = activation == "abs", activation == "relu"
        self.mask = latent_mask
        self.order = self.live_latents = None  # the eligible latents, in order, and how many they are
        if latent_mask is not None and k <= _MOST_K:
            self.order = latent_mask.to(torch.uint8).argsort(descending=True, stable=True)
            self.live_latents = latent_mask.sum(dtype=torch.int32)
        self.bias, self.scale = self._by_position(bias), self._by_position(latent_scale)
        self.values = x.new_empty(self.N, k)
        self.indices = x.new_empty(self.N, k, dtype=torch.int64)

    def _by_position(self, vector: Tensor | None) -> Tensor | None:
        """A vector over the latents in fp32; where only some are eligible, over these."""
        if vector is None:
            return None
        return (vector if self.order is None else vector[self.order]).float().contiguous()

    def run(self) -> tuple[Tensor, Tensor]:
        if self.N == 0:
            return self.values, self.indices
        if self.k > _MOST_K:
            self._sort_scores()
        elif self._screens():
            self._plain(*self._screen())
        else:
            self._plain()
        return self.values, self.indices

    def _screens(self) -> bool:
        # Brackets that widen with D let pass up to 4 k of Gaussian scores (at D = 4096), and their spread.
        fits = (8 if self.D > 2048 else 4) * self.k <= _MOST_CANDIDATES
        possible = self.x.dtype == torch.float32 and self.D > 0 and fits
        if screening is not None or not possible:
            return possible and bool(screening)
        # Enough tokens must share the rounding of the weight; a large k leaves little to drop.
        return self.N >= 64 and self.D >= 64 and self.M >= 4096 and 64 * self.k <= self.M

    def _scratch(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Room for the scores of a stripe, N M / 32 within limits, and a bit for each."""
        area = min(max(self.N * self.M // 32, _LEAST_SCORES), _MOST_SCORES)
        blocks = min(area // (tokens * BLOCK), triton.cdiv(self.M, BLOCK))
        return self._scores(tokens, max(1, blocks) * BLOCK)

    def _scores(self, tokens: int, width: int) -> tuple[Tensor, Tensor]:
        scores = self.x.new_empty(tokens, width, dtype=torch.float32)
        return scores, self.x.new_empty(tokens, width // 32, dtype=torch.int32)

    def _plain(self, rows: Tensor | None = None, live: Tensor | None = None) -> None:
        """Encode all tokens, or of `rows` those before `live`, by exact scores."""
        capacity = triton.next_power_of_2(self.k + BLOCK)
        for first in range(0, self.N, _MOST_TOKENS):
            count = min(_MOST_TOKENS, self.N - first)
            matrix = self.x[first : first + count] if rows is None else self.x
            tokens = Tokens(matrix, count, None, first, rows, live)
            lists = Lists(count, capacity, self.x.device)
            scratch = self._scratch(count)
            width = scratch[0].shape[1]
            for begin in range(0, self.M, width):
                matrix = self.weight[begin:] if self.order is None else self.weight
                atoms = Atoms(matrix, begin, min(width, self.M - begin), None, self.order)
                self._score(tokens, atoms, scratch, lists.bounds)
                self._collect(tokens, atoms, scratch, lists, slice(count))
            self._select(tokens, lists)

    def _screen(self) -> tuple[Tensor, Tensor]:
        """Encode all tokens by screen and refine; returns all, the undecided ones first, and their number."""
        x, weight = with_unit_stride(self.x), with_unit_stride(self.weight)
        capacity = triton.next_power_of_2(min(8 * self.k, _MOST_CANDIDATES) + BLOCK)
        # The lists too shall be N M / 32 numbers.
        most = min(self.N * self.M // (32 * 3 * capacity), _MOST_SCREENED_TOKENS)
        most = max(1, most // _MOST_TOKENS) * _MOST_TOKENS
        undecided = []
        for first in range(0, self.N, most):
            count = min(most, self.N - first)
            exact = Tokens(x[first : first + count], count, None, first)
            lists = Lists(count, capacity, x.device)
            scratch = self._scratch(min(count, _MOST_TOKENS))
            width = scratch[0].shape[1]
            short, terms = self._round(exact.matrix, count)
            for begin in range(0, self.M, width):
                matrix = weight[begin:] if self.order is None else weight
                atoms = Atoms(matrix, begin, min(width, self.M - begin))
                rounded, atom_terms = self._round(matrix, atoms.count, atoms)
                atoms = replace(atoms, matrix=rounded, terms=atom_terms)
                for start in range(0, count, _MOST_TOKENS):
                    block = slice(start, min(start + _MOST_TOKENS, count))
                    tokens = Tokens(short[block], block.stop - start, terms[:, block])
                    self._score(tokens, atoms, scratch, lists.bounds[block])
                    self._collect(tokens, atoms, scratch, lists, block)
            self._refine(exact, weight, lists)
            self._select(exact, lists)
            undecided.append(lists.counts == GIVEN_UP.value)
        flags = torch.cat(undecided)
        return flags.to(torch.uint8).argsort(descending=True, stable=True), flags.sum(dtype=torch.int32)

    def _sort_scores(self) -> None:
        """Encode all tokens by sorting all scores of a few at a time: for a k beyond what lists serve."""
        width = triton.cdiv(self.M, BLOCK) * BLOCK
        step = max(1, _MOST_SCORES // width)
        latents = torch.arange(self.M - 1, -1, -1, device=self.x.device)
        atoms = Atoms(self.weight, 0, self.M)
        for first in range(0, self.N, step):
            count = min(step, self.N - first)
            tokens = Tokens(self.x[first : first + count], count)
            scratch = self._scores(count, width)
            self._score(tokens, atoms, scratch, Lists(count, 0, self.x.device).bounds)
            scores = scratch[0][:, : self.M]
            keys = scores if self.scale is None else scores * self.scale
            orders = orders_of(keys.abs() if self.absolute else keys).long()
            if self.mask is not None:
                orders = orders.masked_fill(~self.mask, UNSET.value)
            best = ((orders << 32) | latents).topk(self.k).values
            indices = self.M - 1 - (best & 0xFFFFFFFF)
            values = scores.gather(1, indices)
            if self.relu:
                values = values.masked_fill(values <= 0, 0.0)
            self.values[first : first + count] = values
            self.indices[first : first + count] = indices

    # What follows launches one kernel each.

    def _round(self, matrix: Tensor, count: int, stripe: Atoms | None = None) -> tuple[Tensor, Tensor]:
        """Rows of tokens, or of a stripe, in bf16 and padded to whole tiles; the bracket's terms."""
        padded = triton.cdiv(self.D, 64) * 64
        rounded = self.x.new_empty(count, padded, dtype=torch.bfloat16)
        terms = self.x.new_empty(3, count)
        begin = stripe.begin if stripe else 0
        bias, scale, order = (
            None if stripe is None or vector is None else vector[begin:]
            for vector in (self.bias, self.scale, self.order)
        )
        rows = 256 if INTERPRETED else 1
        round_rows[(triton.cdiv(count, rows),)](
            matrix,
            order,
            scale,
            bias,
            rounded,
            terms,
            matrix.stride(0),
            self.D,
            padded,
            count,
            accumulation_unit(self.x.device),
            TOKENS=stripe is None,
            ROWS=rows,
            BLOCK=min(1024, triton.next_power_of_2(padded)),
            num_warps=4,
            **OPTIONS,
        )
        return rounded, terms

    def _score(self, tokens: Tokens, atoms: Atoms, scratch: tuple[Tensor, Tensor], bounds: Tensor) -> None:
        criteria = Criteria(self.bias, self.scale, self.absolute, bounds)
        score_stripe("topk_encode", tokens, atoms, criteria, self.live_latents, scratch)

    def _collect(
        self, tokens: Tokens, atoms: Atoms, scratch: tuple[Tensor, Tensor], lists: Lists, block: slice
    ) -> None:
        options = lists.options()
        collect[(triton.cdiv(tokens.count, options["ROWS"]),)](
            *scratch,
            self.scale,
            tokens.live,
            tokens.first,
            self.live_latents,
            tokens.terms,
            0 if tokens.terms is None else tokens.terms.stride(0),
            atoms.terms,
            *lists.columns[:, block],
            lists.counts[block],
            lists.bounds[block],
            tokens.count,
            atoms.begin,
            atoms.count,
            scratch[0].shape[1],
            self.M,
            self.k,
            ABSOLUTE=self.absolute,
            **options,
        )

    def _refine(self, tokens: Tokens, weight: Tensor, lists: Lists) -> None:
        # Programs enough for the machine, whatever the tokens.
        split = 1 if INTERPRETED else 4 if tokens.count >= _MOST_TOKENS else 16
        refine[(tokens.count * split,)](
            tokens.matrix,
            weight,
            self.bias,
            self.scale,
            self.order,
            *lists.columns,
            lists.counts,
            self.D,
            tokens.matrix.stride(0),
            weight.stride(0),
            ABSOLUTE=self.absolute,
            SPLIT=split,
            BLOCK_K=256 if INTERPRETED else 8,
            BLOCK_D=min(512, triton.next_power_of_2(self.D)),
            CAPACITY=lists.capacity,
            num_warps=4,
            **OPTIONS,
        )

    def _select(self, tokens: Tokens, lists: Lists) -> None:
        options = lists.options()
        selected = triton.next_power_of_2(self.k)
        select[(triton.cdiv(tokens.count, options["ROWS"]),)](
            *lists.columns,
            lists.counts,
            self.order,
            tokens.rows,
            tokens.live,
            tokens.first,
            self.values,
            self.indices,
            tokens.count,
            self.k,
            RELU=self.relu,
            SELECTED=selected,
            RIVALS=rivals_of(selected),
            **options,
        )


def topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    activation: int,
    latent_scale: Tensor | None,
    latent_mask: Tensor | None,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """x (N, D), weight (M, D), bias and latent_scale (M,), latent_mask (M,) bool; two (N, groups k)."""
    chosen = option_at("topk_encode", "activation", activation, ACTIVATIONS)
    if groups == 1:
        return _Encoder(x, weight, bias, k, chosen, latent_scale, latent_mask).run()
    parts = (
        [None] * groups if tensor is None else tensor.tensor_split(groups)
        for tensor in (weight, bias, latent_scale, latent_mask)
    )
    found = [
        _Encoder(x, W, b, k, chosen, scale, mask).run() for W, b, scale, mask in zip(*parts, strict=True)
    ]
    size = weight.shape[0] // groups
    values = torch.cat([values for values, _ in found], dim=1)
    return values, torch.cat([indices + g * size for g, (_, indices) in enumerate(found)], dim=1)
