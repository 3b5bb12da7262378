"""One SAE step, forward, backward, all gradients: against dense torch and (peers) the training libraries."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from torch import Tensor

from benchmarks import shapes, steps
from benchmarks.bars import Bar, speed_bar
from benchmarks.cases import OURS, Options, matrix_bytes, run_case, short_of_memory, skipped
from benchmarks.ceilings import Work, products
from benchmarks.checks import close
from benchmarks.harness import Contender
from benchmarks.shapes import Shape
from benchmarks.steps import Step

TOLERANCE = 1e-4  # relative to the norm of a gradient
REQUIRED = {"sparsify": 2.5, "SAELens": 10.0, "dictionary_learning": 10.0}  # at the first shape


def run(options: Options) -> Iterator[tuple[dict[str, Any], list[Bar]]]:
    for place, shape in enumerate(options.shapes(shapes.STEP)):
        case = _case(shape, options)
        required = REQUIRED if options.peers and place == 0 else {}
        yield (
            case,
            [
                speed_bar(f"SAE step ({shape}): against {who}", case, who, least)
                for who, least in required.items()
            ],
        )


def _case(shape: Shape, options: Options) -> dict[str, Any]:
    facts = {"data": "gaussian", "dtype": "fp32"}
    # Weights, gradients and copies of every contender; the dense code, its gradient and temporaries.
    need = 16 * matrix_bytes((shape.M, shape.D)) + 5 * matrix_bytes((shape.N, shape.M))
    if (shortage := short_of_memory(need)) is not None:
        return skipped(shape.name, shape, shortage, **facts)
    parameters, x = steps.problem(shape, "gaussian")
    expected = steps.ReferenceStep(parameters, shape.k).run(x)
    contenders = [
        # Built at the first call, within the harness: a peer that can't be imported is reported, not fatal.
        Contender(
            name, partial(_run, cache(partial(build, parameters, shape.k)), x), partial(_check, expected)
        )
        for name, build in _builders(options).items()
    ]
    contenders += products(x, parameters.W_enc)
    N, D, M, k = shape.N, shape.D, shape.M, shape.k
    # The encoder's product, and decode, d_values, d_W_dec, d_W_enc on k latents a token; both weights are
    # read and both gradients written once.
    product = 2.0 * N * D * M
    work = Work(product + 8 * N * k * D, 4 * matrix_bytes((M, D)) + 2 * matrix_bytes((N, D)), product)
    return run_case(shape.name, shape, contenders, options, work=work, **facts)


def _builders(options: Options) -> dict[str, Callable[..., Step]]:
    ours_and_torch = {OURS: steps.FastsparseStep, "torch": steps.DenseStep}
    if not options.peers:
        return {**ours_and_torch, "torch.compile": steps.CompiledStep}
    from benchmarks.peers import dictionary_learning, sae_lens, sparsify

    return {
        **ours_and_torch,
        "sparsify": sparsify.SparsifyStep,
        "SAELens": sae_lens.SAELensStep,
        "SAELens, sparse activations": partial(sae_lens.SAELensStep, sparse=True),
        "dictionary_learning": dictionary_learning.DictionaryLearningStep,
    }


def _run(build: Callable[[], Step], x: Tensor) -> Step:
    return build().run(x)


def _check(expected: Step, step: Step) -> str:
    verdicts = [close("loss", step.last_loss / step.scale, expected.last_loss, TOLERANCE)]
    got = step.gradients()
    for name, gradient in expected.gradients().items():
        verdicts.append(close(f"d_{name}", got[name] / step.scale, gradient, TOLERANCE))
    return ", ".join(verdicts)
