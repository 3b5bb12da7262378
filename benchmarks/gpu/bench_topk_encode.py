"""``topk_encode``, forward, and its memory: against ``topk(relu(linear))`` and the bare matrix product."""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import fastsparse
from benchmarks import data, shapes
from benchmarks.bars import Bar, speed_bar
from benchmarks.bench_topk_encode import torch_encode
from benchmarks.cases import OURS, describe, figures
from benchmarks.ceilings import PRODUCT
from benchmarks.checks import TopKOracle
from benchmarks.gpu import baselines
from benchmarks.gpu.ceilings import product
from benchmarks.gpu.lab import BFLOAT16_ROUNDING, DTYPES, Job, Lab, median, no_bars, on_backend, with_floor
from benchmarks.harness import Contender, measure
from benchmarks.shapes import Shape

OVER_PRODUCT = {"Llama-3-8B": 1.15, "GPT-2": 1.3}  # at most so many times the bare product, in bf16
OVER_TORCH = {"bf16": 2.5, "fp32": 4.0}  # at least so many times as fast, at the headline shapes
MEMORY = 10.0  # percent of the N x M matrix, in the dtype of the input


def jobs(lab: Lab, ceilings: dict[str, float]) -> Iterator[Job]:
    wanted = [(shape, "gaussian", dtype, 0) for dtype in ("bf16", "fp32") for shape in shapes.GPU_HEADLINE]
    wanted += [(shape, "correlated", "fp32", 2) for shape in shapes.GPU_HEADLINE]
    wanted += [(shapes.GPU_TRAINING[0], "gaussian", dtype, 3) for dtype in ("bf16", "fp32")]
    wanted += [(shapes.GPU_TRAINING[1], "gaussian", "bf16", 3), (shapes.GPU_AUXK, "gaussian", "bf16", 4)]
    wanted += [(shape, "gaussian", "bf16", 5) for shape in shapes.GPU_FEW_TOKENS]
    wanted += [(shape, "gaussian", "fp32", 6) for shape in shapes.GPU_TRAINING[2:]]
    for shape, kind, dtype, priority in wanted:
        name = f"{shape.name}, {kind}, {dtype}"
        bars = partial(_bars, shape, dtype) if shape.headline and kind == "gaussian" else no_bars
        run = partial(case, lab, name, shape, kind, dtype)
        yield Job(priority, "topk_encode", name, run, bars)


def case(lab: Lab, name: str, full: Shape, kind: str, dtype: str, *, alone: bool = False) -> dict[str, Any]:
    """Measure one problem; ``alone`` without others."""
    shape = lab.shape(full)
    x, weight = (tensor.to(DTYPES[dtype]) for tensor in problem(shape, kind, lab.device))
    bias = data.bias(shape).to(lab.device, DTYPES[dtype])
    oracle = TopKOracle.of(x, weight, bias, shape.k)
    encode = partial(fastsparse.topk_encode, x, weight, bias, k=shape.k)
    rounding = 0.0 if dtype == "fp32" else BFLOAT16_ROUNDING
    exact = partial(oracle.check, stored=rounding)
    rounded = partial(
        oracle.check, selected=rounding, stored=rounding
    )  # they select on scores in their dtype
    theirs = partial(torch_encode, x, weight, bias, shape.k)
    contenders = lab.ours(encode, exact)
    if not alone:
        contenders += [Contender("torch", theirs, rounded), *products(x, weight)]
    if not alone and full.headline and kind == "gaussian":
        flashinfer = partial(baselines.flashinfer_encode, x, weight, bias, shape.k)
        contenders.append(Contender(baselines.FLASHINFER, flashinfer, rounded))
        if dtype == "bf16" and not lab.rehearsal:  # compiling takes many seconds
            compiled = partial(_compiled(), x, weight, bias, shape.k)
            contenders.append(Contender("torch.compile", compiled, rounded))
    with torch.no_grad():
        found = describe(name, shape, data=kind, dtype=dtype) | {"headline": full.headline}
        found |= figures(measure(contenders, **lab.measuring(full)))
        _say_memory(lab, found, encode, x, len(weight))
    bare = [name for name in found["contenders"] if name.startswith(PRODUCT)]
    floors = [seconds for name in bare if (seconds := median(found, name)) is not None]
    if floors:
        with_floor(found, min(floors), [name for name in found["contenders"] if name not in bare])
    return found


@lru_cache(maxsize=1)  # shapes follow one another in two dtypes
def problem(shape: Shape, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and weight, fp32, on the device."""
    return data.tokens(shape, kind).to(device), data.dictionary(shape, kind).to(device)


def products(x: Tensor, weight: Tensor) -> list[Contender]:
    """The bare product in the inputs' dtype, and in bf16, in which a screen may run."""
    calls = {next(name for name, dtype in DTYPES.items() if dtype == x.dtype): product(x, weight)}
    if x.dtype == torch.float32:
        calls["bf16"] = product(x.bfloat16(), weight.bfloat16())
    return [
        Contender(f"{PRODUCT} {dtype}", run, lambda _: "a ceiling: torch's own product")
        for dtype, run in calls.items()
    ]


def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    torch._dynamo.reset()  # a function compiled for too many shapes falls back to eager without a word
    return torch.compile(torch_encode, fullgraph=True, dynamic=False)


def _say_memory(lab: Lab, case: dict[str, Any], encode: Callable[[], Any], x: Tensor, M: int) -> None:
    """Adds to each of ours the most memory that a call holds at once beyond its inputs, outputs included."""
    case["matrix_bytes"] = len(x) * M * x.dtype.itemsize
    if lab.device.type != "cuda":
        return
    for name, run in [(OURS, encode)] + [
        (f"{OURS}, {backend}", partial(on_backend, backend, encode)) for backend in lab.backends
    ]:
        if median(case, name) is None:
            continue
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        case["contenders"][name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before


def _bars(full: Shape, dtype: str, case: dict[str, Any]) -> list[Bar]:
    at = f"topk_encode, {full.name} ({full}), {dtype}"
    record = case["contenders"].get(OURS, {})
    note = case.get("skipped") or record.get("failure", "")
    bars = [speed_bar(f"{at}: against torch", case, "torch", OVER_TORCH[dtype])]
    if dtype == "bf16":
        ours, bare = median(case, OURS), median(case, f"{PRODUCT} {dtype}")
        ratio = ours / bare if ours and bare else None
        bars.append(Bar(f"{at}: over the bare product", "<=", OVER_PRODUCT[full.name], ratio, note=note))
    peak = record.get("peak_bytes")
    share = None if peak is None else 100 * peak / case["matrix_bytes"]
    return [*bars, Bar(f"{at}: peak memory over N x M", "<", MEMORY, share, unit="%", note=note)]
