"""One SAE step, forward, backward, all gradients: against a dense step in PyTorch, compiled too.

Against the training libraries: (peers) their own code, on a GPU their ways restated.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, data, shapes, steps
from benchmarks.bars import Bar, speed_bar
from benchmarks.cases import OURS, matrix_bytes
from benchmarks.ceilings import Work, products
from benchmarks.checks import close
from benchmarks.harness import Contender
from benchmarks.lab import Job, Lab, on_backend
from benchmarks.shapes import Shape
from benchmarks.steps import Parameters, Step

# At least so many times as fast: on a CPU at the first shape, on a GPU in bf16.
REQUIRED = {"sparsify": 2.5, "SAELens": 10.0, "dictionary_learning": 10.0}
REQUIRED_OF_A_GPU = {baselines.SPARSIFY: 3.0, "torch": 8.0}
# Relative to a gradient's norm. In bf16 others choose on rounded scores: a few hundredths of their latents
# are not the k largest, and the gradients of those are other latents'.
OURS_MAY, OTHERS_MAY = {"fp32": 1e-4, "bf16": 2e-2}, {"fp32": 1e-4, "bf16": 0.4}


def jobs(lab: Lab) -> Iterator[Job]:
    if lab.choice:
        return
    large, small = lab.shapes(shapes.GPU_STEP if lab.gpu else shapes.STEP)
    wanted = ((0, large, "fp32"), (0, small, "fp32"))
    if lab.gpu:
        wanted = ((1, large, "bf16"), (1, small, "bf16"), (3, small, "fp32"))
    required = REQUIRED_OF_A_GPU if lab.gpu else REQUIRED if lab.peers else {}
    for priority, shape, dtype in wanted:
        name = f"{shape.name}, bf16 autocast" if dtype == "bf16" else shape.name
        promised = dtype == "bf16" or shape is large
        bars = partial(_bars, name, shape, required if promised else {})
        # Weights, gradients and copies of every contender; the dense code, its gradient and temporaries.
        need = 16 * matrix_bytes((shape.M, shape.D)) + 5 * matrix_bytes((shape.N, shape.M))
        facts = {"data": "gaussian", "dtype": dtype}
        run = partial(case, lab, shape, dtype)
        yield Job("sae_step", name, shape, run, bars, need, priority, facts)


def _bars(name: str, shape: Shape, required: dict[str, float], case: dict[str, Any]) -> list[Bar]:
    return [
        speed_bar(f"{name} ({shape}): against {who}", case, who, least) for who, least in required.items()
    ]


def case(lab: Lab, shape: Shape, dtype: str) -> dict[str, Any]:
    parameters, x = _problem(shape, dtype, lab.device)
    right = steps.DenseStep(parameters, shape.k).run(x)  # in fp32: plain PyTorch's answer
    expected = {"loss": right.last_loss, **{f"d_{name}": grad for name, grad in right.gradients().items()}}
    del right
    build, built = partial(_build, parameters, shape.k, dtype), []
    cleared = built if lab.gpu else []  # on a CPU to give memory back takes time, which is for nobody to pay
    contenders = [
        # Built at the first call, within the harness: a peer that can't be imported is reported, not fatal.
        Contender(who, partial(_run, cache(partial(build, kind, built)), cleared, backend, x), check)
        for who, kind, backend, check in _entrants(lab, dtype, expected)
    ]
    N, D, M, k = shape.N, shape.D, shape.M, shape.k
    # The encoder's product, and decode, d_values, d_W_dec, d_W_enc on k latents a token; both weights are
    # read and both gradients written once.
    product = 2.0 * N * D * M
    least = 4 * matrix_bytes((M, D)) + 2 * matrix_bytes((N, D))
    if not lab.gpu:
        contenders += products(x, parameters.W_enc)
    return lab.measure(shape, contenders, Work(least, product + 8 * N * k * D, product))


def _entrants(lab: Lab, dtype: str, expected: dict[str, Tensor]) -> Iterator[tuple]:
    """Name, step, backend and check of everyone."""
    exact, loose = (partial(check, expected, tolerance[dtype]) for tolerance in (OURS_MAY, OTHERS_MAY))
    yield OURS, steps.FastsparseStep, None, exact
    yield "torch", steps.DenseStep, None, loose
    for backend in lab.backends:
        yield f"{OURS}, {backend}", steps.FastsparseStep, backend, exact
    if lab.torchs and not lab.quick:  # half a minute of compiling on a GPU
        yield "torch.compile", steps.CompiledStep, None, loose
    if lab.gpu:
        yield baselines.SPARSIFY, baselines.SparsifyStep, None, loose
        yield baselines.ATOMICS, baselines.AtomicStep, None, loose
    elif lab.peers:
        from benchmarks.peers import dictionary_learning, sae_lens, sparsify

        yield "sparsify", sparsify.SparsifyStep, None, loose
        yield "SAELens", sae_lens.SAELensStep, None, loose
        sparse = partial(sae_lens.SAELensStep, sparse=True)
        yield "SAELens, sparse activations", sparse, None, loose
        yield "dictionary_learning", dictionary_learning.DictionaryLearningStep, None, loose


def _problem(shape: Shape, dtype: str, device: torch.device) -> tuple[Parameters, Tensor]:
    """In bf16: numbers that bf16 holds exactly, so that fp32 and bf16 steps see the same scores."""
    if dtype != "bf16":
        return steps.problem(shape, "gaussian", device)
    weight = data.dictionary(shape, "gaussian").to(device).bfloat16().float()
    x = data.tokens(shape, "gaussian").to(device).bfloat16().float()
    zeros = torch.zeros(shape.M, device=device), torch.zeros(shape.D, device=device)
    return Parameters(weight, zeros[0], weight.clone(), zeros[1]), x


def _build(parameters: Parameters, k: int, dtype: str, kind: Callable[..., Step], built: list[Step]) -> Step:
    step = kind(parameters, k)
    step.low = torch.bfloat16 if dtype == "bf16" else None
    built.append(step)
    return step


def _run(build: Callable[[], Step], cleared: list[Step], backend: str | None, x: Tensor) -> Step:
    step = build()
    for other in cleared:  # everyone's gradients at once would be many times what a step needs
        other.forget()
    return step.run(x) if backend is None else on_backend(backend, partial(step.run, x))


def check(expected: dict[str, Tensor], tolerance: float, step: Step) -> str:
    got = {"loss": step.last_loss, **{f"d_{name}": grad for name, grad in step.gradients().items()}}
    pairs = ((name, got[name] / step.scale, right) for name, right in expected.items())
    return ", ".join(close(*pair, tolerance) for pair in pairs)
