"""``topk_encode``, forward: against ``topk(relu(linear))``, eager and compiled, and (peers) against FAISS.

On a GPU also against flashinfer's selection and the bare matrix product; and the memory that it takes.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastsparse
from benchmarks import baselines, data, shapes
from benchmarks.bars import Bar, speed_bar
from benchmarks.cases import OURS, matrix_bytes
from benchmarks.ceilings import PRODUCT, Work, products
from benchmarks.checks import TopKOracle
from benchmarks.harness import Contender
from benchmarks.lab import DTYPES, Job, Lab, grid, median, named, on_backend
from benchmarks.shapes import Shape
from fastsparse.backend import use_cpu_level

AVX2 = f"{OURS}, AVX2 forced"
ROUNDING = {"fp32": 0.0, "bf16": 2.0**-8}
# Promised on a GPU.
OVER_PRODUCT = {"Llama-3-8B": 1.15, "GPT-2": 1.3}  # at most so many times the bare product, in bf16
OVER_TORCH = {"bf16": 2.5, "fp32": 4.0}  # at least so many times as fast, at the headline shapes
MEMORY = 10.0  # percent of the N x M matrix, in the dtype of the input


def jobs(lab: Lab) -> Iterator[Job]:
    for priority, shape, kind, dtype in wanted(lab):
        name, facts = named(shape.name, kind, dtype), {"data": kind, "dtype": dtype}
        run = partial(case, lab, shape, kind, dtype)
        # The weights in fp32 and, here and in our screen, in bf16; torch's product and its relu.
        need = 2 * matrix_bytes((shape.M, shape.D), (shape.N, shape.M))
        bars = partial(promised, lab, shape, kind, dtype)
        yield Job("topk_encode", name, shape, run, bars, need, priority, facts)


def wanted(lab: Lab) -> Iterator[tuple[int, Shape, str, str]]:
    """Priority, shape, kind of data and dtype of every case."""
    if lab.choice:
        yield from grid(lab.shapes(shapes.GRID))
    elif lab.gpu:
        headline, training = lab.shapes(shapes.GPU_HEADLINE), lab.shapes(shapes.GPU_TRAINING)
        yield from ((0, shape, "gaussian", dtype) for dtype in ("bf16", "fp32") for shape in headline)
        yield from ((2, shape, "correlated", "fp32") for shape in headline)
        yield from ((3, training[0], "gaussian", dtype) for dtype in ("bf16", "fp32"))
        yield from ((3, shape, "gaussian", "bf16") for shape in (training[1], *lab.shapes([shapes.GPU_AUXK])))
        yield from ((5, shape, "gaussian", "bf16") for shape in lab.shapes(shapes.GPU_FEW_TOKENS))
        yield from ((6, shape, "gaussian", "fp32") for shape in training[2:])
    else:
        for shape in lab.shapes(shapes.ALL):
            for kind in data.KINDS if shape.correlated else data.KINDS[:1]:
                yield 0, shape, kind, "fp32"
                if shape.headline and kind == "gaussian" and not lab.peers:
                    yield 0, shape, kind, "bf16"


def torch_encode(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What people write today."""
    return torch.topk(torch.relu(F.linear(x, weight, bias)), k)


def case(lab: Lab, shape: Shape, kind: str, dtype: str) -> dict[str, Any]:
    x, weight = (tensor.to(DTYPES[dtype]) for tensor in problem(shape, kind, lab.device))
    # FAISS has no bias: with zeros everyone solves the same problem, and we still pay for adding it.
    bias = (torch.zeros(shape.M) if lab.peers else data.bias(shape)).to(lab.device, DTYPES[dtype])
    oracle, rounding = TopKOracle.of(x, weight, bias, shape.k), ROUNDING[dtype]
    rounded = partial(oracle.check, selected=rounding, stored=rounding)  # who selects on scores in its dtype
    encode = partial(fastsparse.topk_encode, x, weight, bias, k=shape.k)
    contenders = lab.ours(encode, partial(oracle.check, stored=rounding))
    if not lab.choice:
        contenders.append(Contender("torch", partial(torch_encode, x, weight, bias, shape.k), rounded))
    if lab.libraries and not lab.gpu:
        from benchmarks.peers import faiss

        contenders.append(Contender("faiss", partial(faiss.encode, x, weight, shape.k), rounded))
    if lab.libraries and lab.gpu and shape.headline and kind == "gaussian":
        flashinfer = partial(baselines.flashinfer_encode, x, weight, bias, shape.k)
        contenders.append(Contender(baselines.FLASHINFER, flashinfer, rounded))
    if lab.torchs:
        if not lab.gpu and dtype == "fp32":
            contenders.append(Contender(AVX2, partial(_forced, "avx2", encode), rounded))
        if shape.headline and not lab.quick and dtype == ("bf16" if lab.gpu else "fp32"):
            compiled = partial(_compiled(), x, weight, bias, shape.k)
            contenders.append(Contender("torch.compile", compiled, rounded))
        contenders += products(x, weight)
    N, D, M, k = shape.N, shape.D, shape.M, shape.k
    product = 2.0 * N * D * M
    least = matrix_bytes((M, D), (N, D), (N, k), (1, M), dtype=x.dtype) + 8 * N * k
    with torch.no_grad():
        found = lab.measure(shape, contenders, Work(least, product, product))
        if lab.gpu:
            _say_memory(lab, found, encode, x, M)
    return found


@lru_cache(maxsize=1)  # shapes follow one another in two dtypes
def problem(shape: Shape, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and weight, fp32, on the device."""
    return data.tokens(shape, kind).to(device), data.dictionary(shape, kind).to(device)


def _forced(level: str, encode: Callable[[], Any]) -> Any:
    with use_cpu_level(level):
        return encode()


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


def promised(lab: Lab, shape: Shape, kind: str, dtype: str, case: dict[str, Any]) -> list[Bar]:
    at = f"topk_encode, {shape.name} ({shape}), {kind if dtype == 'fp32' and not lab.gpu else dtype}"
    if lab.gpu:
        of_headline = shape.headline and kind == "gaussian" and not lab.choice
        return _promised_on_a_gpu(at, shape, dtype, case) if of_headline else []
    if dtype != "fp32":
        return []
    if lab.peers:
        return [speed_bar(f"{at}: against faiss.knn", case, "faiss", shape.faiss)]
    return [
        speed_bar(f"{at}: against torch", case, "torch", shape.speedup),
        speed_bar(f"{at}: AVX2 forced, against torch", case, "torch", 1.0, ours=AVX2),
    ]


def _promised_on_a_gpu(at: str, shape: Shape, dtype: str, case: dict[str, Any]) -> list[Bar]:
    record = case["contenders"].get(OURS, {})
    note = case.get("skipped") or record.get("failure", "")
    bars = [speed_bar(f"{at}: against torch", case, "torch", OVER_TORCH[dtype])]
    if dtype == "bf16":
        ours, bare = median(case, OURS), median(case, f"{PRODUCT} {dtype}")
        ratio = ours / bare if ours and bare else None
        bars.append(Bar(f"{at}: over the bare product", "<=", OVER_PRODUCT[shape.name], ratio, note=note))
    peak = record.get("peak_bytes")
    share = None if peak is None else 100 * peak / case["matrix_bytes"]
    return [*bars, Bar(f"{at}: peak memory over N x M", "<", MEMORY, share, unit="%", note=note)]
