"""``topk_encode``, forward: against ``topk(relu(linear))``, eager and compiled, and (peers) against FAISS.

On a GPU also against flashinfer's selection and the bare matrix product; and the memory that it takes.
"""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import fastsparse
from benchmarks import baselines, data, encoder, shapes
from benchmarks.bars import Bar, missing, speed_bars
from benchmarks.cases import OURS, matrix_bytes, median
from benchmarks.ceilings import PRODUCT, Work, products
from benchmarks.checks import TopKOracle
from benchmarks.harness import Contender
from benchmarks.lab import DTYPES, Job, Lab, compiled, on_backend
from benchmarks.shapes import Given, Shape, each, grid
from fastsparse.backend import _cpu, use_cpu_level

AVX2 = f"{OURS}, AVX2 forced"
INTEGERS = f"{OURS}, without bf16"  # as a processor does that has AVX-512 and no product of bf16
ROUNDING = {"fp32": 0.0, "bf16": 2.0**-8}
# Promised on a GPU.
OVER_PRODUCT = {"Llama-3-8B": 1.15, "GPT-2": 1.3}  # at most so many times the bare product, in bf16
OVER_TORCH = {"bf16": 2.5, "fp32": 4.0}  # at least so many times as fast, at the headline shapes
MEMORY = 10.0  # percent of the N x M matrix, in the dtype of the input


def jobs(lab: Lab) -> Iterator[Job]:
    for given in wanted(lab):
        shape = given.shape
        # The weights in fp32 and, here and in our screen, in bf16; torch's product and its relu.
        need = 2 * matrix_bytes((shape.M, shape.D), (shape.N, shape.M))
        run, bars = partial(case, lab, given), partial(promised, lab, given)
        yield Job("topk_encode", given.name(), given, run, bars, need)
        if lab.trace and given.priority == 0:
            given = replace(given, shape=replace(shape, headline=False), priority=2)
            for name in lab.backends:
                of_blocks = partial(blocks, lab, given, name)
                yield Job("topk_encode", given.name(f"blocks in {name}"), given, of_blocks, need=need)


def wanted(lab: Lab) -> Iterator[Given]:
    if lab.choice:
        yield from grid(lab.shapes(shapes.GRID))
    elif lab.gpu:
        headline, training = lab.shapes(shapes.GPU_HEADLINE), lab.shapes(shapes.GPU_TRAINING)
        yield from each(0, headline, "bf16")
        yield from each(0, headline, "fp32")
        yield from each(2, headline, "fp32", kinds=["correlated"])
        yield from each(3, training[:1], "bf16", "fp32")
        yield from each(3, [training[1], *lab.shapes([shapes.GPU_AUXK])], "bf16")
        yield from each(5, lab.shapes(shapes.GPU_FEW_TOKENS), "bf16")
        yield from each(6, training[2:], "fp32")
    else:
        for shape in lab.shapes(shapes.ALL):
            for kind in shape.kinds:
                both = shape.headline and kind == "gaussian" and not lab.peers
                yield from each(0, [shape], "fp32", *["bf16"] * both, kinds=[kind])


def case(lab: Lab, given: Given) -> dict[str, Any]:
    shape, dtype = given.shape, given.dtype
    x, weight = (tensor.to(DTYPES[dtype]) for tensor in problem(shape, given.kind, lab.device))
    # FAISS has no bias: with zeros everyone solves the same problem, and we still pay for adding it.
    bias = (torch.zeros(shape.M) if lab.peers else data.bias(shape)).to(lab.device, DTYPES[dtype])
    oracle, rounding = TopKOracle.of(x, weight, bias, shape.k), ROUNDING[dtype]
    rounded = partial(oracle.check, selected=rounding, stored=rounding)  # who selects on scores in its dtype

    def contender(name: str, encode: Callable[..., Any], *inputs: Any) -> Contender:
        return Contender(name, partial(encode, *(inputs or (x, weight, bias, shape.k))), rounded)

    encode = partial(fastsparse.topk_encode, x, weight, bias, k=shape.k)
    contenders = lab.ours(encode, partial(oracle.check, stored=rounding))
    if not lab.choice:
        contenders.append(contender("torch", baselines.torch_encode))
    if lab.libraries and not lab.gpu:
        from benchmarks.peers import faiss

        contenders.append(contender("faiss", faiss.encode, x, weight, shape.k))
    if lab.libraries and lab.gpu and shape.headline and given.kind == "gaussian":
        contenders.append(contender(baselines.FLASHINFER, baselines.flashinfer_encode))
    if lab.torchs:
        if not lab.gpu and dtype == "fp32":
            contenders.append(contender(AVX2, _forced, "avx2", encode))
            if _cpu.best_level == "avx512" and shape.N >= 64:  # from where on it would
                contenders.append(contender(INTEGERS, _by_integers, encode))
        if lab.compiles and shape.headline and dtype == ("bf16" if lab.gpu else "fp32"):
            contenders.append(contender("torch.compile", compiled(baselines.torch_encode)))
        contenders += products(x, weight)
    N, D, M, k = shape.N, shape.D, shape.M, shape.k
    product = 2.0 * N * D * M
    least = matrix_bytes((M, D), (N, D), (N, k), (1, M), dtype=x.dtype) + 8 * N * k
    with torch.no_grad():
        found = lab.measure(shape, contenders, Work(least, product, product))
        if lab.gpu:
            found["matrix_bytes"] = N * M * x.dtype.itemsize
        if lab.device.type == "cuda":
            for ours in lab.ours(encode, str):
                if median(found, ours.name) is not None:
                    found["contenders"][ours.name]["peak_bytes"] = _peak(ours.run)
            for name in lab.backends if lab.trace else ():
                record = found["contenders"][f"{OURS}, {name}"]
                if "median" in record:
                    record |= encoder.candidates(name, partial(on_backend, name, encode), N, M)
    return found


def blocks(lab: Lab, given: Given, name: str) -> dict[str, Any]:
    """The same call on one of our backends, in blocks of other sizes."""
    shape, rounding = given.shape, ROUNDING[given.dtype]
    x, weight = (tensor.to(DTYPES[given.dtype]) for tensor in problem(shape, given.kind, lab.device))
    bias = data.bias(shape).to(x)
    check = partial(TopKOracle.of(x, weight, bias, shape.k).check, stored=rounding)
    encode = partial(fastsparse.topk_encode, x, weight, bias, k=shape.k)
    with torch.no_grad():
        return lab.measure(shape, list(encoder.by_blocks(name, encode, check)))


@lru_cache(maxsize=1)  # shapes follow one another in two dtypes
def problem(shape: Shape, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and weight, fp32, on the device."""
    return data.tokens(shape, kind).to(device), data.dictionary(shape, kind).to(device)


def _forced(level: str, encode: Callable[[], Any]) -> Any:
    with use_cpu_level(level):
        return encode()


def _by_integers(encode: Callable[[], Any]) -> Any:
    _cpu.library.fastsparse_cpu_knobs.restype = ctypes.POINTER(ctypes.c_int64)
    screening = _cpu.library.fastsparse_cpu_knobs()  # the first of them: see csrc/cpu/edge/knobs.h
    try:
        screening[0] = 2
        return encode()
    finally:
        screening[0] = -1


def _peak(run: Callable[[], Any]) -> int:
    """The most bytes of a GPU that a call holds at once beyond its inputs, outputs included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def promised(lab: Lab, given: Given, case: dict[str, Any]) -> list[Bar]:
    shape, dtype = given.shape, given.dtype
    at = f"topk_encode, {shape.name} ({shape}), {given.kind if dtype == 'fp32' and not lab.gpu else dtype}"
    if lab.gpu:
        of_headline = shape.headline and given.kind == "gaussian" and not lab.choice
        return _promised_on_a_gpu(at, shape, dtype, case) if of_headline else []
    if dtype != "fp32":
        return []
    if lab.peers:
        return speed_bars(at, {"faiss": shape.faiss}, case)
    forced = speed_bars(f"{at}, AVX2 forced", {"torch": 1.0}, case, ours=AVX2)
    if INTEGERS in case["contenders"]:
        avx2, integers = (median(case, who) for who in (AVX2, INTEGERS))
        ratio = avx2 / integers if avx2 and integers else None
        forced.append(
            Bar(f"{at}, without bf16: against AVX2", ">=", 1.0, ratio, note=missing(case, INTEGERS))
        )
    return speed_bars(at, {"torch": shape.speedup}, case) + forced


def _promised_on_a_gpu(at: str, shape: Shape, dtype: str, case: dict[str, Any]) -> list[Bar]:
    note = missing(case, OURS)
    bars = speed_bars(at, {"torch": OVER_TORCH[dtype]}, case)
    if dtype == "bf16":
        ours, bare = median(case, OURS), median(case, f"{PRODUCT} {dtype}")
        ratio = ours / bare if ours and bare else None
        bars.append(Bar(f"{at}: over the bare product", "<=", OVER_PRODUCT[shape.name], ratio, note=note))
    peak = case["contenders"].get(OURS, {}).get("peak_bytes")
    share = None if peak is None else 100 * peak / case["matrix_bytes"]
    return [*bars, Bar(f"{at}: peak memory over N x M", "<", MEMORY, share, unit="%", note=note)]
