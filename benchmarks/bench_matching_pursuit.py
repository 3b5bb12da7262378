"""``matching_pursuit``, with a dictionary that is kept and with new ones, and its training step.

Against PyTorch loops (:mod:`benchmarks.pursuits`) and (peers) the SAE libraries; against orthogonal matching
pursuit, which refits all its coefficients in every step, as an encoder of equally many atoms.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import fastsparse
from benchmarks import data, pursuits, shapes
from benchmarks.bars import Bar, speed_bar
from benchmarks.cases import OURS, Options, matrix_bytes, run_case, short_of_memory, skipped
from benchmarks.ceilings import Work
from benchmarks.checks import PursuitOracle, close, energy_error
from benchmarks.harness import Contender
from benchmarks.pursuits import PursuitStep, Steps
from benchmarks.shapes import Shape

GRAM = "torch, Gram matrix"
KEPT, NEW = "kept dictionary", "new dictionary"
REQUIRED = {  # at the small shape on Gaussian data: how many times as fast we must be
    KEPT: {GRAM: 2.5, "SAELens": 6.0, "overcomplete": 10.0},
    NEW: {"SAELens": 2.0},
}
REQUIRED_WIDE = {"torch": 8.0}
REQUIRED_STEP = {"overcomplete": 15.0}
CHECKED = 128  # rows of the wide problem: fp64 takes seconds for those
OMP_ROWS = 16  # scikit-learn copies the Gram matrix for every row
ENERGY = 4  # relative, in eps of fp32, after hundreds of steps
GRADIENT = 1e-4  # relative to the norm of a gradient
FP32 = {"dtype": "fp32"}


def run(options: Options) -> Iterator[tuple[dict[str, Any], list[Bar]]]:
    (small,) = options.shapes([shapes.PURSUIT])
    for kind, kept in itertools.product(data.KINDS, (True, False)):
        yield _small(small, kind, kept, options)
    if options.peers:
        yield _orthogonal(small, options), []
    else:
        yield _wide(*options.shapes([shapes.WIDE_PURSUIT]), options)
        yield _long(*options.shapes([shapes.LONG_PURSUIT]), options)
    yield _step(*options.shapes([shapes.PURSUIT_STEP]), options)


def encode(x: Tensor, dictionary: Tensor, k: int, method: str = "auto") -> Steps:
    return fastsparse.matching_pursuit(x, dictionary, k=k, nonnegative=True, normalized=True, method=method)


def _renewed(encode: Callable[..., Any], x: Tensor, dictionary: Tensor, *rest: Any, **options: Any) -> Any:
    pursuits.renew(dictionary)
    return encode(x, dictionary, *rest, **options)


def _settle(x: Tensor, dictionary: Tensor, k: int) -> None:
    """Have the Gram matrix made, which method auto does by itself after some calls with one dictionary."""
    with torch.no_grad():
        encode(x, dictionary, k, method="gram")


def _small(shape: Shape, kind: str, kept: bool, options: Options) -> tuple[dict[str, Any], list[Bar]]:
    x, dictionary = data.tokens(shape, kind), data.dictionary(shape, kind)
    oracle = PursuitOracle.of(x, dictionary, shape.k, nonnegative=True)
    encoders: dict[str, Callable[..., Any]] = {OURS: encode, "torch": pursuits.torch_loop}
    peers: dict[str, Callable[..., Tensor]] = {}
    if options.peers:
        from benchmarks.peers import overcomplete, sae_lens

        peers["SAELens"] = sae_lens.pursue
        if kept:
            peers["overcomplete"] = overcomplete.encoder(dictionary, shape.k)
        encoders |= peers
    else:
        gram = pursuits.gram_matrix(dictionary) if kept else None
        encoders[GRAM] = partial(pursuits.torch_gram_loop, gram=gram)
        if kept:
            torch._dynamo.reset()
            step = torch.compile(pursuits.torch_step, fullgraph=True, dynamic=False)
            encoders["torch.compile"] = partial(pursuits.torch_loop, step=step)
        else:
            encoders |= {f"{OURS}, {method}": partial(encode, method=method) for method in ("direct", "gram")}
    contenders = []
    for name, encoder in encoders.items():
        call = encoder if kept else partial(_renewed, encoder)
        check = oracle.check_codes if name in peers else oracle.check
        contenders.append(Contender(name, partial(call, x, dictionary, shape.k), check))
    what = KEPT if kept else NEW
    name = f"{shape.name}, {kind}, {what}"
    if kept:
        _settle(x, dictionary, shape.k)
    with torch.no_grad():
        case = run_case(name, shape, contenders, options, work=_work(shape, kept), data=kind, **FP32)
    bars = []
    if kind == "gaussian":
        required = {who: least for who, least in REQUIRED[what].items() if who in encoders}
        bars = [_bar(name, shape, case, who, least) for who, least in required.items()]
    return case, bars


def _orthogonal(shape: Shape, options: Options) -> dict[str, Any]:
    """Signed, as OMP is. Only scikit-learn's takes a Gram matrix that was made before."""
    from benchmarks.peers import scikit_learn, spams

    x, dictionary = data.tokens(shape, "gaussian"), data.dictionary(shape, "gaussian")
    oracle = PursuitOracle.of(x, dictionary, shape.k, nonnegative=False)
    few = min(OMP_ROWS, shape.N)
    rows = x[:few]
    of_few = PursuitOracle.of(rows, dictionary, shape.k, nonnegative=False)
    ours = partial(fastsparse.matching_pursuit, x, dictionary, k=shape.k, normalized=True)
    gram = pursuits.gram_matrix(dictionary)
    contenders = [
        Contender(OURS, ours, oracle.check),
        Contender("SPAMS OMP", partial(spams.omp, x, dictionary, shape.k), oracle.check_orthogonal),
        Contender(
            "scikit-learn OMP",
            partial(scikit_learn.omp, rows, dictionary, shape.k, gram),
            of_few.check_orthogonal,
            samples=3,
            share=few / shape.N,
        ),
    ]
    name = f"{shape.name}, gaussian, {KEPT}, signed"
    _settle(x, dictionary, shape.k)
    with torch.no_grad():
        return run_case(name, shape, contenders, options, data="gaussian", **FP32)


def _wide(shape: Shape, options: Options) -> tuple[dict[str, Any], list[Bar]]:
    """With new dictionaries: whatever is made of one is made within the timing."""
    name = f"{shape.name}, gaussian, {NEW}"
    # Our Gram matrix and the loop's, the scores and rows of theirs, the dictionary and its copies.
    need = 2 * matrix_bytes((shape.M, shape.M), (shape.N, shape.M)) + 4 * matrix_bytes((shape.M, shape.D))
    if (shortage := short_of_memory(need)) is not None:
        case = skipped(name, shape, shortage, data="gaussian", **FP32)
    else:
        x, dictionary = data.tokens(shape, "gaussian"), data.dictionary(shape, "gaussian")
        quarter = x[: shape.N // 4]

        def contender(who: str, encoder: Callable[..., Steps], tokens: Tensor, **rest: Any) -> Contender:
            run = partial(_renewed, encoder, tokens, dictionary, shape.k)
            return Contender(who, run, partial(_check_rows, tokens, dictionary, shape.k), **rest)

        contenders = [
            contender(OURS, encode, x),
            contender("torch", pursuits.torch_loop, quarter, samples=3, share=len(quarter) / shape.N),
            contender(GRAM, pursuits.torch_gram_loop, x, samples=1),
        ]
        with torch.no_grad():
            case = run_case(
                name, shape, contenders, options, work=_work(shape, False), data="gaussian", **FP32
            )
    return case, [_bar(name, shape, case, who, least) for who, least in REQUIRED_WIDE.items()]


def _check_rows(x: Tensor, dictionary: Tensor, k: int, steps: Steps) -> str:
    """The verdict on some of the rows."""
    rows = torch.linspace(0, len(x) - 1, min(len(x), CHECKED)).long()
    values, indices, residual = (part[rows] for part in steps)
    return PursuitOracle.of(x[rows], dictionary, k, nonnegative=True).check((values, indices, residual))


def _long(shape: Shape, options: Options) -> tuple[dict[str, Any], list[Bar]]:
    """Hundreds of steps: is the energy still accounted for, and every choice fp64's?"""
    x, dictionary = data.tokens(shape, "gaussian"), data.dictionary(shape, "gaussian")
    oracle = PursuitOracle.of(x, dictionary, shape.k, nonnegative=True)
    found: list[Steps] = []

    def keep() -> Steps:
        found.append(encode(x, dictionary, shape.k))
        return found[-1]

    with torch.no_grad():
        case = run_case(
            f"{shape.name}, gaussian", shape, [Contender(OURS, keep, oracle.check)], options, **FP32
        )
    record = case["contenders"][OURS]
    note = record.get("failure", record.get("check", ""))
    error = energy_error(x, found[-1][0], found[-1][2]) if found else None
    case["energy_error"] = error
    units = None if error is None else error / torch.finfo(torch.float32).eps
    return case, [
        Bar(
            f"matching_pursuit, {shape.name} ({shape}): relative error of |x|^2 = |values|^2 + |residual|^2",
            "<=", ENERGY, units, unit="fp32 eps",
        ),
        Bar(
            f"matching_pursuit, {shape.name} ({shape}): calls with a clear choice that is not fp64's",
            "<=", 0, float("failure" in record), unit="calls", note=note,
        ),
    ]  # fmt: skip


def _step(shape: Shape, options: Options) -> tuple[dict[str, Any], list[Bar]]:
    facts = {"data": "gaussian", **FP32}
    # Autograd's memory for the dense codes of overcomplete: two N x M in every step, and three more at once.
    need = (2 * shape.k + 4) * matrix_bytes((shape.N, shape.M)) if options.peers else 0.0
    if (shortage := short_of_memory(need)) is not None:
        case = skipped(shape.name, shape, shortage, **facts)
    else:
        x, dictionary, b_dec, oracle = pursuits.problem(shape)
        check = partial(_check_step, *pursuits.expected_gradients(oracle))
        contenders = [
            # Built at the first call, within the harness: a peer that can't be imported is reported.
            Contender(
                name, partial(_run_step, cache(partial(build, dictionary, b_dec, shape.k)), x), check,
                samples=None if name == OURS else 3,
            )
            for name, build in _step_builders(options).items()
        ]  # fmt: skip
        case = run_case(shape.name, shape, contenders, options, **facts)
    required = REQUIRED_STEP if options.peers else {}
    return case, [_bar(shape.name, shape, case, who, least) for who, least in required.items()]


def _step_builders(options: Options) -> dict[str, Callable[..., PursuitStep]]:
    ours_and_torch = {OURS: pursuits.FastsparsePursuitStep, "torch": pursuits.TorchPursuitStep}
    if not options.peers:
        return ours_and_torch
    from benchmarks.peers import overcomplete, sae_lens

    return {
        **ours_and_torch,
        "SAELens": sae_lens.SAELensPursuitStep,
        "overcomplete": overcomplete.OvercompletePursuitStep,
    }


def _run_step(build: Callable[[], PursuitStep], x: Tensor) -> PursuitStep:
    return build().run(x)


def _check_step(loss: Tensor, gradients: dict[str, Tensor], step: PursuitStep) -> str:
    verdicts = [close("loss", step.last_loss / step.scale, loss, GRADIENT)]
    got = step.gradients()
    for name, gradient in gradients.items():
        verdicts.append(close(f"d_{name}", got[name] / step.scale, gradient, GRADIENT))
    return ", ".join(verdicts)


def _bar(name: str, shape: Shape, case: dict[str, Any], who: str, least: float) -> Bar:
    return speed_bar(f"matching_pursuit, {name} ({shape}): against {who}", case, who, least)


def _work(shape: Shape, kept: bool) -> Work:
    """By the Gram matrix, the least that is known: x @ dictionary.T, half of the symmetric matrix where it is
    new, and k of its rows a token."""
    N, D, M, k = shape.N, shape.D, shape.M, shape.k
    product = 2.0 * N * D * M + (0.0 if kept else M * M * D)
    moved = matrix_bytes((M, D), (N, 2 * D), (N * (k - 1), M)) + 12 * N * k
    return Work(product + 2.0 * N * k * M, moved, 0.0)
