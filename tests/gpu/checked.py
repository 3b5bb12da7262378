"""Ops on small problems, their answers checked: what compute-sanitizer watches, and a new GPU runs first.

Every op that a backend has, or one, which is then also given awkward sizes and strides. With ``--planted``
instead one read far out of bounds, by an index that nobody checks: a sanitizer that doesn't report it doesn't
work here.
"""

import argparse
import math
import random
import sys
import time
from importlib import import_module
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, beside the package that it tests

import torch
from gpu.suite import FOUND
from oracle import laid_out
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
# The least, none at all, and primes, at which topk_encode screens fp32.
AWKWARD = (
    Sizes(N=1, D=1, M=2, k=1, many=2, T=1, H=1),
    Sizes(N=0, D=5, M=7, k=2, many=3, T=3, H=2),
    Sizes(N=131, D=131, M=4099, k=13, many=23, T=7, H=3),
)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-10}
# Of integers their answers are exact, so that they must be right bit by bit, ties included.
EXACT = {
    *("topk_encode", "batch_topk_encode", "threshold_encode", "spmm", "sddmm", "spmm_t"),
    *("linear_recurrence", "linear_recurrence_backward"),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Check ops on small problems.")
    parser.add_argument("--planted", action="store_true", help="read out of bounds instead")
    parser.add_argument("--op", help="this one alone (default: all), at awkward sizes and strides too")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no case is begun")
    chosen = parser.parse_args(arguments)
    if chosen.planted:
        outside = torch.full((1, 1), 1 << 24, device="cuda")
        with fastsparse.use_backend("cuda"):
            fastsparse.spmm(torch.ones(1, 1, device="cuda"), outside, torch.ones(2, 32, device="cuda"))
        torch.cuda.synchronize()
        return 0
    end = time.monotonic() + chosen.seconds
    names = [name for name in SAMPLES if any(chosen.op in (None, op) for op, _ in recorded(SAMPLES[name]))]
    cases = list(product(TOLERANCE, (*SIZES, *(AWKWARD if chosen.op else ())), names))
    if chosen.op:  # some of every kind, where time doesn't suffice for all
        random.Random(0).shuffle(cases)
    checked = wrong = left = 0
    for dtype, sizes, name in cases:
        if time.monotonic() > end:
            left += 1
            continue
        if not sizes.N and name.startswith("batch_topk_encode"):
            continue  # it keeps one entry at least
        for op, given in recorded(SAMPLES[name], sizes, dtype=dtype):
            if chosen.op not in (None, op) or not takes(chosen.backend, op, dtype):
                continue
            for strided in (False, True) if chosen.op else (False,):
                what = f"{op} in {name}, {str(dtype)[6:]}, {sizes}{', strided' * strided}"
                print(what, flush=True)  # what a crash or a hang is to be seen by
                fault = check(op, given, dtype, chosen.backend, chosen.device, strided)
                checked += 1
                if fault is not None:
                    wrong += 1
                    print(f"{FOUND}{what}: {fault}", flush=True)
                    if chosen.device == "cuda":
                        torch.cuda.synchronize()  # raises where nothing more can be run
    print(f"{checked} answers, {wrong} wrong, {left} of {len(cases)} cases left for want of time")
    return 1 if wrong or not checked else 0


def takes(backend: str, op: str, dtype: torch.dtype) -> bool:
    if backend == "triton" and backend in OPS[op].kernels:
        return dtype in import_module(f"fastsparse.kernels.{op}").DTYPES
    return backend in (*OPS[op].kernels, "reference")


def check(
    op: str, given: list, dtype: torch.dtype, backend: str, device: str, strided: bool = False
) -> str | None:
    """What is wrong with an op's answer beside its definition in fp64, for which every solver is the same."""
    exact = strided and op in EXACT
    if exact:
        given = [value.round() if _is_real(value) else value for value in given]
    layout = "strided" if strided else "contiguous"
    there = [laid_out(v.to(device), layout) if isinstance(v, torch.Tensor) else v for v in given]
    try:
        with fastsparse.use_backend(backend):
            found = getattr(torch.ops.fastsparse, op).default(*there)
        found = [part.cpu() for part in (found if isinstance(found, tuple) else [found])]
    except Exception as error:  # the other calls are to be seen too
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    here = [value.double() if _is_real(value) else value for value in given]
    for place, (name, choices) in OPS[op].options.items():
        if name == "solver":
            here[place] = choices.index("sequential")
    right = OPS[op].define(*here)
    for mine, theirs in zip(found, right if isinstance(right, tuple) else [right], strict=True):
        if exact:
            if not torch.equal(mine, theirs.to(mine.dtype)):
                return f"{int((mine != theirs.to(mine.dtype)).sum())} of {mine.numel()} integers differ"
            continue
        if not _is_real(mine):  # what was chosen, which may be another within rounding; or passes
            continue
        mine, theirs = mine.double(), theirs.double()
        if op == "matching_pursuit":  # another choice within rounding makes other values, of the same sizes
            mine, theirs = mine.norm(), theirs.norm()
        # What cancels, of numbers about 1, is held against these.
        distance = (mine - theirs).norm() / theirs.norm().clamp_min(1e-2)
        if not distance <= TOLERANCE[dtype]:
            return f"relative error {distance:.3g}"
    return None


def _is_real(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
