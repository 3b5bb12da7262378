"""Every CUDA C++ op on small problems, its answers checked: what compute-sanitizer watches.

With ``--planted`` instead one read far out of bounds, by an index that nobody checks: a sanitizer that
doesn't report it doesn't work here.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, beside the package that it tests

import torch
from samples import SAMPLES, Sizes, recorded

import fastsparse
from fastsparse.ops._library import OPS

# Around warps, packets and blocks; the last but one with latents hot enough to be split, the last with time
# in segments.
SIZES = (
    Sizes(N=1, D=8, M=40, k=3, many=40, T=70, H=1),
    Sizes(N=33, D=40, M=530, k=7, many=300, T=5, H=37),
    Sizes(N=300, D=12, M=4, k=4, many=4, T=3, H=5),
    Sizes(N=3, D=257, M=1100, k=33, many=600, T=500, H=3),
)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-10}


def main(arguments: list[str]) -> int:
    if arguments == ["--planted"]:
        outside = torch.full((1, 1), 1 << 24, device="cuda")
        with fastsparse.use_backend("cuda"):
            fastsparse.spmm(torch.ones(1, 1, device="cuda"), outside, torch.ones(2, 32, device="cuda"))
        torch.cuda.synchronize()
        return 0
    for sizes in SIZES:
        for dtype in TOLERANCE:
            for name, sample in SAMPLES.items():
                for op, given in recorded(sample, sizes, dtype=dtype, device="cuda"):
                    if "cuda" in OPS[op].kernels:
                        check(f"{name}, {sizes}", op, given, dtype)
    return 0


def check(what: str, op: str, given: list, dtype: torch.dtype) -> None:
    """An op on a GPU beside its definition on the CPU, for which every solver is the same."""
    with fastsparse.use_backend("cuda"):
        found = getattr(torch.ops.fastsparse, op).default(*given)
    here = [value.cpu() if isinstance(value, torch.Tensor) else value for value in given]
    for place, (name, choices) in OPS[op].options.items():
        if name == "solver":
            here[place] = choices.index("sequential")
    right = OPS[op].define(*here)
    pairs = zip(found, right, strict=True) if isinstance(found, tuple) else [(found, right)]
    for mine, theirs in pairs:
        if not mine.is_floating_point():  # what was chosen, which may be another within rounding; or passes
            continue
        mine, theirs = mine.cpu().double(), theirs.double()
        if op == "matching_pursuit":  # another choice within rounding makes other values, of the same sizes
            mine, theirs = mine.norm(), theirs.norm()
        distance = (mine - theirs).norm() / theirs.norm().clamp_min(1e-30)
        if not distance <= TOLERANCE[dtype]:
            raise SystemExit(f"{what}: {op}, {dtype}: relative error {distance:.3g}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
