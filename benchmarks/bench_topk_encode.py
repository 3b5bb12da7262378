"""``topk_encode``, forward: against ``topk(relu(linear))``, eager and compiled, and (peers) against FAISS."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastsparse
from benchmarks import data, shapes
from benchmarks.bars import Bar, speed_bar
from benchmarks.cases import OURS, Options, matrix_bytes, run_case, short_of_memory, skipped
from benchmarks.ceilings import Work, products
from benchmarks.checks import TopKOracle
from benchmarks.harness import Contender
from benchmarks.shapes import Shape
from fastsparse.backend import use_cpu_level

AVX2 = f"{OURS}, AVX2 forced"
BF16_ROUNDING = 2.0**-8


def run(options: Options) -> Iterator[tuple[dict[str, Any], list[Bar]]]:
    for shape in options.shapes(shapes.ALL):
        for kind in data.KINDS if shape.correlated else data.KINDS[:1]:
            if (shortage := short_of_memory(_need(shape))) is not None:
                case = skipped(f"{shape.name}, {kind}", shape, shortage, data=kind, dtype="fp32")
                yield case, _bars(shape, kind, case, options)
                continue
            x, weight = data.tokens(shape, kind), data.dictionary(shape, kind)
            # FAISS has no bias: with zeros everyone solves the same problem, and we still pay for adding it.
            bias = torch.zeros(shape.M) if options.peers else data.bias(shape)
            case = _fp32(shape, kind, x, weight, bias, options)
            yield case, _bars(shape, kind, case, options)
            if shape.headline and kind == "gaussian" and not options.peers:
                yield _bf16(shape, kind, x.bfloat16(), weight.bfloat16(), bias.bfloat16(), options), []


def torch_encode(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What people write today."""
    return torch.topk(torch.relu(F.linear(x, weight, bias)), k)


def _forced(level: str, encode: Callable[[], Any]) -> Any:
    with use_cpu_level(level):
        return encode()


def _fp32(
    shape: Shape, kind: str, x: Tensor, weight: Tensor, bias: Tensor, options: Options
) -> dict[str, Any]:
    oracle = TopKOracle.of(x, weight, bias, shape.k)
    ours = partial(fastsparse.topk_encode, x, weight, bias, k=shape.k)
    contenders = [
        Contender(OURS, ours, oracle.check),
        Contender("torch", partial(torch_encode, x, weight, bias, shape.k), oracle.check),
    ]
    if options.peers:
        from benchmarks.peers import faiss

        contenders.append(Contender("faiss", partial(faiss.encode, x, weight, shape.k), oracle.check))
    else:
        contenders.append(Contender(AVX2, partial(_forced, "avx2", ours), oracle.check))
        if shape.headline:
            contenders.append(_compiled(x, weight, bias, shape.k, oracle))
        contenders += products(x, weight)
    with torch.no_grad():
        return run_case(
            f"{shape.name}, {kind}", shape, contenders, options,
            work=_work(shape, torch.float32), data=kind, dtype="fp32",
        )  # fmt: skip


def _bf16(
    shape: Shape, kind: str, x: Tensor, weight: Tensor, bias: Tensor, options: Options
) -> dict[str, Any]:
    """bf16 inputs: we select on fp32 scores, torch on scores rounded to bf16."""
    oracle = TopKOracle.of(x, weight, bias, shape.k)
    exact = partial(oracle.check, stored=BF16_ROUNDING)
    contenders = [
        Contender(OURS, partial(fastsparse.topk_encode, x, weight, bias, k=shape.k), exact),
        Contender(
            "torch",
            partial(torch_encode, x, weight, bias, shape.k),
            partial(oracle.check, selected=BF16_ROUNDING, stored=BF16_ROUNDING),
        ),
    ]
    with torch.no_grad():
        return run_case(
            f"{shape.name}, {kind}, bf16", shape, [*contenders, *products(x, weight)[1:2]], options,
            work=_work(shape, torch.bfloat16), data=kind, dtype="bf16",
        )  # fmt: skip


def _compiled(x: Tensor, weight: Tensor, bias: Tensor, k: int, oracle: TopKOracle) -> Contender:
    torch._dynamo.reset()  # a function compiled for too many shapes falls back to eager without a word
    compiled = torch.compile(torch_encode, fullgraph=True, dynamic=False)
    return Contender("torch.compile", partial(compiled, x, weight, bias, k), oracle.check)


def _bars(shape: Shape, kind: str, case: dict[str, Any], options: Options) -> list[Bar]:
    at = f"topk_encode, {shape.name} ({shape}), {kind}"
    if options.peers:
        return [speed_bar(f"{at}: against faiss.knn", case, "faiss", shape.faiss)]
    return [
        speed_bar(f"{at}: against torch", case, "torch", shape.speedup),
        speed_bar(f"{at}: AVX2 forced, against torch", case, "torch", 1.0, ours=AVX2),
    ]


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    N, D, M, k = shape.N, shape.D, shape.M, shape.k
    product = 2.0 * N * D * M
    return Work(product, matrix_bytes((M, D), (N, D), (N, k), (1, M), dtype=dtype) + 8 * N * k, product)


def _need(shape: Shape) -> float:
    """Bytes: the weights in fp32 and, here and in our screen, in bf16; torch's product and its relu."""
    return 2 * matrix_bytes((shape.M, shape.D), (shape.N, shape.M))
