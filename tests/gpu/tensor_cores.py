"""How far sums on this GPU's tensor cores are off, beside what the certificate of fp32's screens assumes.

Tensor cores add 8 or 16 products to a sum at once, cut where the largest among them has its last bits. Most
is lost where one large term is in the sum while all others end just below that place, wherever it is: so the
rows here have one, or some that cancel, beside terms of every smaller size in patterns of signs; others are
random.
"""

import argparse
import os
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, beside the package that it tests

import torch
from gpu.suite import FOUND
from torch import Tensor

DEPTHS = (64, 768, 4096)
RANDOM = 64  # rows, of either kind


def rows(D: int, signs: int) -> Tensor:
    """In fp64, though bf16 holds them; the large terms stand where those of other rows do."""
    alternating = torch.where(torch.arange(D) % 2 == 0, 1.0, -1.0)
    by_eights = torch.where(torch.arange(D) % 16 < 8, 1.0, -1.0)
    few = (torch.arange(D) % 16 < 15).double()
    patterns = [torch.ones(D), -torch.ones(D), alternating, by_eights, few][:signs]
    large = {"first": [0], "middle": [D // 2], "last": [D - 1], "ends": [0, D - 1]}
    large["every 8th"] = list(range(0, D, 8))
    out = []
    for places, pattern in product(large.values(), patterns):
        for exponent, mantissa in product(range(8, 17), (1.0, 1.5, 1.9921875)):
            row = mantissa * 2.0**-exponent * pattern.double()
            row[places] = 1.0
            if signs > 1:  # of one side alone: these cancel
                row[places[1::2]] = -1.0
            out.append(row)
    return torch.stack(out)


def problem(D: int, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """x and w in bf16, and how many of either's rows, the first, are not random."""
    generator = torch.Generator().manual_seed(D)
    sides = []
    for signs in (1, 5):
        normal = torch.randn(RANDOM, D, generator=generator, dtype=torch.float64)
        uniform = torch.rand(RANDOM, D, generator=generator, dtype=torch.float64)
        sides.append(torch.cat([rows(D, signs), normal, uniform]).to(device, torch.bfloat16))
    x, w = sides
    return x, w, len(x) - 2 * RANDOM, len(w) - 2 * RANDOM


def by_torch(x: Tensor, w: Tensor) -> Tensor:
    return torch.mm(x, w.T, out_dtype=torch.float32) if x.is_cuda else x.float() @ w.float().T


def by_triton(tile: object) -> Callable[[Tensor, Tensor], Tensor]:
    """The product of topk_encode itself, whose bounds let every score pass."""
    from fastsparse.kernels import _topk_product as product
    from fastsparse.kernels import topk_encode as kernel

    def run(x: Tensor, w: Tensor) -> Tensor:
        product.tiles = lambda *_: [tile]
        encoder = kernel._Encoder(x, w, None, 1, "none", None, None)
        scratch = encoder._scores(len(x), -(-len(w) // kernel.BLOCK) * kernel.BLOCK)
        bounds = kernel.Lists(len(x), 0, x.device).bounds
        encoder._score(product.Tokens(x, len(x)), product.Atoms(w, 0, len(w)), scratch, bounds)
        return scratch[0][:, : len(w)]

    return run


def ways() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    from fastsparse.kernels._topk_product import tiles

    sizes = (16, 64, 8192)  # of tokens: other tiles, other instructions
    several = dict.fromkeys(tile for tokens in sizes for tile in tiles(torch.bfloat16, tokens))
    return {"torch.mm": by_torch, **{f"Triton, {tile}": by_triton(tile) for tile in several}}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Hold sums of products of bf16 against fp64.")
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(arguments).device)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from fastsparse.kernels._tensor_cores import accumulation_unit

    wrong = 0
    print("largest error in units of D 2^-24 |x| |w|")
    for D in DEPTHS if device.type == "cuda" else DEPTHS[:1]:
        x, w, *hostile = problem(D, device)
        right = x.double() @ w.double().T
        unit = D * 2.0**-24 * x.double().norm(dim=1)[:, None] * w.double().norm(dim=1)[None, :]
        bound = accumulation_unit(device) + 8 / D  # to which 8 2^-24 |x| |w| are added
        for name, run in ways().items():
            try:
                off = (run(x, w).double() - right).abs() / unit
            except Exception as error:  # one way's fault, such as too large a tile
                wrong += 1
                print(f"{FOUND}D={D}, {name}: {type(error).__name__}: {error}", flush=True)
                continue
            most, at_random = float(off.max()), float(off[hostile[0] :, hostile[1] :].max())
            fine = most <= bound  # NaN is not
            wrong += not fine
            says = f"D={D}, {name}: {most:.3f} (random rows {at_random:.3f}), assumed {bound:.3f}"
            print(says if fine else f"{FOUND}{says}", flush=True)
    print(f"{wrong} beyond what is assumed" if wrong else "all within what is assumed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
