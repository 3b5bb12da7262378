"""topk_encode from within, on a GPU: what its screen lets pass, and other sizes of its blocks.

Reaches into both of our backends: a kernel's lists and sizes are nobody else's business.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.cases import OURS
from benchmarks.harness import Contender
from benchmarks.lab import on_backend
from fastsparse import backend
from tests.knobs import turned

DEVICE = "cuda"
UNWRITTEN = -(2**31)
MIB = 1 << 20
# Tokens at a time, and bytes of scores: the first are those that there are.
CUDA = ({}, *({"rows": n} for n in (1024, 2048, 4096)), *({"bytes": m * MIB} for m in (8, 16, 24, 48, 64)))
TRITON = (
    {},
    {"_MOST_TOKENS": 1024},
    {"_MOST_TOKENS": 4096},
    {"_MOST_SCORES": 2**23},
    {"_MOST_SCORES": 2**25},
)
# tokens, latents, depth, warps, stages
TILES = (
    (128, 64, 64, 8, 3), (128, 64, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
    (128, 128, 32, 4, 4), (128, 256, 64, 8, 3), (64, 128, 64, 4, 4), (64, 256, 64, 8, 3),
)  # fmt: skip


def candidates(name: str, encode: Callable[[], Any], N: int, M: int) -> dict[str, float]:
    """Of a call that screens: latents in the lists, a token, and tokens that the (first) screen can't decide.

    Empty where nothing is screened.
    """
    ways = {"cuda": _of_cuda, "triton": _of_triton}
    counts = ways[name](encode, N, M) if name in ways else ()
    if len(counts) == 0:
        return {}
    decided = (counts >= 0).all(dim=1)
    held = counts[decided].sum(dim=1)
    return {"candidates": float(held.sum()) / max(1, len(held)), "undecided": len(counts) - len(held)}


def _of_cuda(encode: Callable[[], Any], N: int, M: int) -> Tensor:
    """(tokens, lists of each): how much each list holds, -1 where it is given up."""
    # A token has a list for every 2048 latents of a stripe at the most.
    counts = torch.full((N * (M // 2048 + 1),), UNWRITTEN, dtype=torch.int32, device=DEVICE)
    with turned(backend._cuda.library, counts=counts.data_ptr()):
        encode()
    counts = counts[counts != UNWRITTEN].cpu()
    return counts.view(N, -1) if len(counts) else counts


def _of_triton(encode: Callable[[], Any], N: int, M: int) -> Tensor:
    from fastsparse.kernels.topk_encode import _Encoder

    seen, refine = [], _Encoder._refine

    def keep(self: Any, tokens: Any, weight: Tensor, lists: Any) -> None:
        seen.append(lists.counts.cpu())
        refine(self, tokens, weight, lists)

    with patch.object(_Encoder, "_refine", keep):
        encode()
    return torch.cat(seen).unsqueeze(1) if seen else torch.empty(0)


def by_blocks(name: str, encode: Callable[[], Any], check: Callable[[Any], str]) -> Iterator[Contender]:
    """The call on one backend, in blocks of other sizes."""
    settings = {"cuda": _of_cuda_blocks, "triton": _of_triton_blocks}
    for said, setting in settings[name]() if name in settings else ():

        def run(setting: Callable[[], Any] = setting) -> Any:
            with setting():
                return on_backend(name, encode)

        yield Contender(f"{OURS}, {name}, {said}", run, check, samples=3)


def _of_cuda_blocks() -> Iterator[tuple[str, Callable[[], Any]]]:
    for values in CUDA:
        yield _said(values), partial(turned, backend._cuda.library, **values)


def _of_triton_blocks() -> Iterator[tuple[str, Callable[[], Any]]]:
    from fastsparse.kernels import _topk_product, topk_encode

    for values in TRITON:
        yield _said(values), partial(patch.multiple, topk_encode, **values) if values else nullcontext
    for sizes in TILES:
        yield f"tile {sizes}", partial(_tiled, _topk_product.Tile(*sizes))


def _said(values: dict[str, int]) -> str:
    return ", ".join(f"{name.strip('_').lower()} {value}" for name, value in values.items()) or "as it is"


@contextmanager
def _tiled(tile: Any) -> Iterator[None]:
    from fastsparse.kernels import _launch, _topk_product

    usual = _topk_product.tiles

    def tiles(dtype: torch.dtype, *rest: Any) -> list:  # fp32's are of another kind
        return usual(dtype, *rest) if dtype == torch.float32 else [tile]

    with patch.object(_topk_product, "tiles", tiles), patch.object(_launch, "_chosen", {}):
        yield
