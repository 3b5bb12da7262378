"""Peak memory of encoding, beyond its inputs: each contender alone in a fresh process, by the kernel's own
account.

``python -m benchmarks.bench_memory CONTENDER N D M k`` is that process: it prints the growth in bytes.
"""

import argparse
import ctypes
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fastsparse
from benchmarks import data, shapes
from benchmarks.bars import Bar
from benchmarks.bench_topk_encode import torch_encode
from benchmarks.cases import OURS, Options, describe, matrix_bytes, short_of_memory
from benchmarks.checks import TopKOracle
from benchmarks.harness import WrongAnswer
from benchmarks.shapes import Shape

ALLOWED = 5.0  # percent of the N x M matrix in fp32
ROOT = Path(__file__).parents[1]
TIMEOUT = 600
PAGE = resource.getpagesize()  # what a growth is known to


def run(options: Options) -> Iterator[tuple[dict[str, Any], list[Bar]]]:
    if options.peers:
        return
    (shape,) = options.shapes([shapes.MEMORY])
    full = matrix_bytes((shape.N, shape.M))
    case = describe(f"{shape.name}", shape, data="gaussian", dtype="fp32", full_matrix=full)
    need = {OURS: 0.5 * full, "torch": 3 * full}  # torch: the product, its relu, and room
    case["contenders"] = {who: _measure(who, shape, need[who]) for who in need}
    used = {who: record["median"] for who, record in case["contenders"].items() if "median" in record}
    case["ratios"] = {OURS: {"torch": {"of_medians": used["torch"] / used[OURS]}}} if len(used) == 2 else {}
    share = 100 * used[OURS] / full if OURS in used else None
    note = case["contenders"][OURS].get("failure", "")
    name = f"memory, encode ({shape}): peak growth over N x M in fp32"
    yield case, [Bar(name, "<", ALLOWED, share, unit="%", note=note)]


def _measure(who: str, shape: Shape, need: float) -> dict[str, Any]:
    if (shortage := short_of_memory(need)) is not None:
        return {"failure": shortage}
    sizes = [str(size) for size in (shape.N, shape.D, shape.M, shape.k)]
    command = [sys.executable, "-m", "benchmarks.bench_memory", who, *sizes, str(torch.get_num_threads())]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"failure": f"no answer within {TIMEOUT} s"}
    if done.returncode != 0:
        return {"failure": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    growth, verdict = done.stdout.strip().split("\t")
    return {"median": float(growth), "samples": 1, "unit": "bytes", "check": verdict}


def probe(who: str, shape: Shape) -> tuple[int, str]:
    """The growth of this process's resident peak over one call, and the verdict on the call's answer."""
    encode = fastsparse.topk_encode if who == OURS else torch_encode
    x, weight, bias = data.tokens(shape, "gaussian"), data.dictionary(shape, "gaussian"), data.bias(shape)
    with torch.no_grad():
        # Libraries set up thread pools and code caches at their first call: they are not what is asked here.
        encode(x[:64].clone(), weight[:1024].clone(), bias[:1024].clone(), k=shape.k)
        _give_back_free_memory()
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # sets the peak back to the present (proc_pid_clear_refs(5))
        answer = encode(x, weight, bias, k=shape.k)
        growth = max(_resident("VmHWM") - before, PAGE)
    rows = torch.linspace(0, shape.N - 1, min(shape.N, 256)).long()
    oracle = TopKOracle.of(x[rows], weight, bias, shape.k)
    return growth, oracle.check((answer[0][rows], answer[1][rows]))


def _give_back_free_memory() -> None:
    """Or what malloc holds in reserve would be used up before the process grows, and hide that growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the peak memory growth of one encode, in bytes.")
    parser.add_argument("contender", choices=[OURS, "torch"])
    for size in ("N", "D", "M", "k", "threads"):
        parser.add_argument(size, type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = Shape("memory", arguments.N, arguments.D, arguments.M, arguments.k)
    try:
        growth, verdict = probe(arguments.contender, shape)
    except WrongAnswer as error:
        raise SystemExit(f"wrong answer: {error}") from None
    print(f"{growth}\t{verdict}")


if __name__ == "__main__":
    main()
