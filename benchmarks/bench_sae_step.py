"""One SAE step, forward, backward, all gradients: against a dense step in PyTorch, compiled too.

Against the training libraries: (peers) their own code, on a GPU their ways restated.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, data, shapes, steps
from benchmarks.bars import speed_bars
from benchmarks.cases import matrix_bytes
from benchmarks.ceilings import Work, products
from benchmarks.lab import Job, Lab
from benchmarks.shapes import Given, Shape, each
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
    wanted = each(0, [large, small], "fp32")
    if lab.gpu:
        wanted = (*each(1, [large, small], "bf16"), *each(3, [small], "fp32"))
    required = REQUIRED_OF_A_GPU if lab.gpu else REQUIRED if lab.peers else {}
    for given in wanted:
        shape, low = given.shape, given.dtype == "bf16"
        name = f"{shape.name}, bf16 autocast" if low else shape.name
        promised = required if low or shape is large else {}
        # Weights, gradients and copies of every contender; the dense code, its gradient and temporaries.
        need = 16 * matrix_bytes((shape.M, shape.D)) + 5 * matrix_bytes((shape.N, shape.M))
        bars = partial(speed_bars, f"{name} ({shape})", promised)
        yield Job("sae_step", name, given, partial(case, lab, given), bars, need)


def case(lab: Lab, given: Given) -> dict[str, Any]:
    shape, low = given.shape, torch.bfloat16 if given.dtype == "bf16" else None
    parameters, x = _problem(shape, low, lab.device)
    expected = steps.DenseStep(parameters, shape.k).run(x).found()  # in fp32: plain PyTorch's answer
    built: list[Step] = []

    def build(kind: Callable[..., Step]) -> Step:
        built.append(kind(parameters, shape.k))
        built[-1].low = low
        return built[-1]

    def run(step: Step) -> Step:
        if lab.gpu:  # everyone's gradients at once would be many times what a step needs
            for other in built:  # on a CPU to give memory back takes time, which is for nobody to pay
                other.forget()
        return step.run(x)

    exact, loose = (partial(steps.check, expected, may[given.dtype]) for may in (OURS_MAY, OTHERS_MAY))
    own = steps.contender("own", partial(build, steps.FastsparseStep), run, exact)
    contenders = lab.ours(own.run, exact)
    contenders += [steps.contender(who, partial(build, kind), run, loose) for who, kind in _others(lab)]
    N, D, M, k = shape.N, shape.D, shape.M, shape.k
    # The encoder's product, and decode, d_values, d_W_dec, d_W_enc on k latents a token; both weights are
    # read and both gradients written once.
    product = 2.0 * N * D * M
    least = 4 * matrix_bytes((M, D)) + 2 * matrix_bytes((N, D))
    if not lab.gpu:
        contenders += products(x, parameters["W_enc"])
    return lab.measure(shape, contenders, Work(least, product + 8 * N * k * D, product))


def _others(lab: Lab) -> Iterator[tuple[str, Callable[..., Step]]]:
    yield "torch", steps.DenseStep
    if lab.compiles:  # half a minute of compiling on a GPU
        yield "torch.compile", steps.CompiledStep
    if lab.gpu:
        yield baselines.SPARSIFY, baselines.SparsifyStep
        yield baselines.ATOMICS, baselines.AtomicStep
    elif lab.peers:
        from benchmarks.peers import dictionary_learning, sae_lens, sparsify

        yield "sparsify", sparsify.SparsifyStep
        yield "SAELens", sae_lens.SAELensStep
        yield "SAELens, sparse activations", partial(sae_lens.SAELensStep, sparse=True)
        yield "dictionary_learning", dictionary_learning.DictionaryLearningStep


def _problem(shape: Shape, low: torch.dtype | None, device: torch.device) -> tuple[Parameters, Tensor]:
    """In bf16: numbers that bf16 holds exactly, so that fp32 and bf16 steps see the same scores."""
    if low is None:
        return steps.problem(shape, device)
    weight, x = (part(shape, "gaussian").to(device, low).float() for part in (data.dictionary, data.tokens))
    b_enc, b_dec = torch.zeros(shape.M, device=device), torch.zeros(shape.D, device=device)
    return {"W_enc": weight, "b_enc": b_enc, "W_dec": weight.clone(), "b_dec": b_dec}, x
