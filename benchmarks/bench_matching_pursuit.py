"""``matching_pursuit``, with a dictionary that is kept and with new ones, and its training step.

Against PyTorch loops (:mod:`benchmarks.pursuits`) and (peers) the SAE libraries; against orthogonal matching
pursuit, which refits all its coefficients in every step, as an encoder of equally many atoms. On a GPU all
make what they need of the dictionary within the timing, as training has to.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import fastsparse
from benchmarks import data, pursuits, shapes, steps
from benchmarks.bars import Bar, speed_bars
from benchmarks.cases import OURS, matrix_bytes
from benchmarks.ceilings import Work
from benchmarks.checks import PursuitOracle, energy_error
from benchmarks.harness import Contender
from benchmarks.lab import Job, Lab, compiled
from benchmarks.pursuits import PursuitStep, ResidualStep, Steps, encode
from benchmarks.shapes import KINDS, Given, Shape, each

GRAM = "torch, Gram matrix"
KEPT, NEW = "kept dictionary", "new dictionary"
METHODS = ("direct", "gram")
REQUIRED = {  # at the small shape on Gaussian data: how many times as fast we must be
    KEPT: {GRAM: 2.5, "SAELens": 6.0, "overcomplete": 10.0},
    NEW: {"SAELens": 2.0},
}
REQUIRED_WIDE = {"torch": 8.0}
REQUIRED_STEP = {"overcomplete": 15.0}
CHECKED = 1 << 26  # scores that the oracle makes in fp64, which takes seconds
OMP_ROWS = 16  # scikit-learn copies the Gram matrix for every row
ENERGY = 4  # relative, in eps of fp32, after hundreds of steps
GRADIENT = 1e-4  # relative to the norm of a gradient


def jobs(lab: Lab) -> Iterator[Job]:
    def job(
        name: str, given: Given, run: Callable[..., dict[str, Any]], *rest: Any, need: float = 0.0,
        required: Mapping[str, float] | None = None, bars: Callable[..., list[Bar]] | None = None,
    ) -> Job:  # fmt: skip
        shape = given.shape
        bars = bars or partial(speed_bars, f"matching_pursuit, {name} ({shape})", required or {})
        return Job("matching_pursuit", name, given, partial(run, lab, shape, *rest), bars, need)

    small, wide, step = lab.shapes([shapes.PURSUIT, shapes.WIDE_PURSUIT, shapes.PURSUIT_STEP])
    if lab.gpu:
        for shape, priority in ((wide, 2), (step, 4), (small, 6)):
            given = Given(shape, kind="gaussian", priority=priority)
            yield job(given.name(NEW), given, case, "gaussian", NEW)
        return
    for given, what in product(each(0, [small], "fp32", kinds=KINDS), (KEPT, NEW)):
        required = REQUIRED[what] if given.kind == "gaussian" else {}
        here = {who: least for who, least in required.items() if (who == GRAM) is not lab.peers}
        yield job(given.name(what), given, case, given.kind, what, required=here)
    small, wide, step = (Given(shape, kind="gaussian") for shape in (small, wide, step))
    if lab.peers:
        yield job(small.name(f"{KEPT}, signed"), small, orthogonal)
    else:
        N, D, M = wide.shape.N, wide.shape.D, wide.shape.M
        # Our Gram matrix and the loop's, the scores and rows of theirs, the dictionary and its copies.
        need = 2 * matrix_bytes((M, M), (N, M)) + 4 * matrix_bytes((M, D))
        yield job(wide.name(NEW), wide, case, "gaussian", NEW, required=REQUIRED_WIDE, need=need)
        (long,) = each(0, lab.shapes([shapes.LONG_PURSUIT]), "fp32")
        yield job(long.name(), long, _long, bars=partial(_bars_of_long, long.shape))
    # Autograd's memory for the dense codes of overcomplete: two N x M in every step, and three more at once.
    need = (2 * step.shape.k + 4) * matrix_bytes((step.shape.N, step.shape.M)) if lab.peers else 0.0
    required = REQUIRED_STEP if lab.peers else {}
    yield job(step.shape.name, step, _step, required=required, need=need)


def _renewed(encode: Callable[..., Any], x: Tensor, dictionary: Tensor, *rest: Any, **options: Any) -> Any:
    pursuits.renew(dictionary)
    return encode(x, dictionary, *rest, **options)


def _settle(x: Tensor, dictionary: Tensor, k: int) -> None:
    """Have the Gram matrix made, which method auto does by itself after some calls with one dictionary."""
    with torch.no_grad():
        encode(x, dictionary, k, method="gram")


@dataclass(frozen=True)
class Problem:
    """Tokens and dictionary on the device; which rows are checked, and the pursuit of those, on the CPU."""

    x: Tensor
    dictionary: Tensor
    rows: Tensor
    oracle: PursuitOracle

    @staticmethod
    @lru_cache(maxsize=1)
    def of(shape: Shape, kind: str, device: torch.device, nonnegative: bool = True) -> "Problem":
        x, dictionary = data.tokens(shape, kind), data.dictionary(shape, kind)
        count = min(shape.N, max(64, CHECKED // (shape.k * shape.M)))
        rows = torch.linspace(0, shape.N - 1, count).long()
        oracle = PursuitOracle.of(x[rows], dictionary, shape.k, nonnegative=nonnegative)
        return Problem(x.to(device), dictionary.to(device, copy=True), rows.to(device), oracle)

    def judge(self, seen: int, steps: Steps) -> str:
        """Of the checked rows those among the first ``seen``, where a contender was given no more."""
        inside = self.rows < seen
        oracle = self.oracle.some(inside.cpu())
        return oracle.check(tuple(part[self.rows[inside]].cpu() for part in steps))

    def judge_codes(self, codes: Tensor) -> str:
        return self.oracle.check_codes(codes[self.rows])


def case(lab: Lab, shape: Shape, kind: str, what: str) -> dict[str, Any]:
    problem, kept = Problem.of(shape, kind, lab.device), what == KEPT
    x, dictionary, check = problem.x, problem.dictionary, partial(problem.judge, shape.N)

    def of(encoder: Callable[..., Any], tokens: Tensor = x) -> Callable[..., Any]:
        return partial(encoder if kept else partial(_renewed, encoder), tokens, dictionary, shape.k)

    whole = lab.gpu or shape.name == shapes.PURSUIT.name
    variants = {"method": METHODS} if lab.gpu or (whole and not kept and not lab.peers) else {}
    contenders = lab.ours(of(encode), check, **variants)
    if not lab.choice:
        part = x if whole else x[: max(1, shape.N // 4)]  # a loop over all of them takes too long
        of_part = partial(problem.judge, len(part))
        few = {} if whole else {"samples": 3, "share": len(part) / shape.N}
        contenders.append(Contender("torch", of(pursuits.torch_loop, part), of_part, **few))
    if lab.torchs:
        gram = pursuits.gram_matrix(dictionary) if kept else None
        of_gram = of(partial(pursuits.torch_gram_loop, gram=gram))
        contenders.append(Contender(GRAM, of_gram, check, samples=None if whole else 1))
        if lab.compiles and (kept or (lab.gpu and shape.headline)):
            loop = partial(pursuits.torch_loop, step=compiled(pursuits.torch_step))
            contenders.append(Contender("torch.compile", of(loop), check))
    if lab.libraries and not lab.gpu:
        from benchmarks.peers import overcomplete, sae_lens

        peers = {"SAELens": sae_lens.pursue}
        if kept:
            peers["overcomplete"] = overcomplete.encoder(dictionary, shape.k)
        contenders += [Contender(who, of(encoder), problem.judge_codes) for who, encoder in peers.items()]
    if kept:
        _settle(x, dictionary, shape.k)
    with torch.no_grad():
        return lab.measure(shape, contenders, _work(lab, shape, kept))


def orthogonal(lab: Lab, shape: Shape) -> dict[str, Any]:
    """Signed, as OMP is. Only scikit-learn's takes a Gram matrix that was made before."""
    from benchmarks.peers import scikit_learn, spams

    problem = Problem.of(shape, "gaussian", lab.device, nonnegative=False)
    x, dictionary, few = problem.x, problem.dictionary, min(OMP_ROWS, shape.N)
    ours = partial(fastsparse.matching_pursuit, x, dictionary, k=shape.k, normalized=True)
    theirs = partial(scikit_learn.omp, x[:few], dictionary, shape.k, pursuits.gram_matrix(dictionary))
    of_few = PursuitOracle.of(x[:few], dictionary, shape.k, nonnegative=False).check_orthogonal
    contenders = [
        Contender(OURS, ours, partial(problem.judge, shape.N)),
        Contender(
            "SPAMS OMP", partial(spams.omp, x, dictionary, shape.k),
            lambda codes: problem.oracle.check_orthogonal(codes[problem.rows]),
        ),
        Contender("scikit-learn OMP", theirs, of_few, samples=3, share=few / shape.N),
    ]  # fmt: skip
    _settle(x, dictionary, shape.k)
    with torch.no_grad():
        return lab.measure(shape, contenders)


def _long(lab: Lab, shape: Shape) -> dict[str, Any]:
    """Hundreds of steps: is the energy still accounted for, and every choice fp64's?"""
    problem, found = Problem.of(shape, "gaussian", lab.device), []

    def keep() -> Steps:
        found[:] = encode(problem.x, problem.dictionary, shape.k)
        return tuple(found)

    with torch.no_grad():
        case = lab.measure(shape, [Contender(OURS, keep, partial(problem.judge, shape.N))])
    return case | {"energy_error": energy_error(problem.x, found[0], found[2]) if found else None}


def _bars_of_long(shape: Shape, case: dict[str, Any]) -> list[Bar]:
    record, error = case["contenders"].get(OURS, {}), case.get("energy_error")
    units = None if error is None else error / torch.finfo(torch.float32).eps
    failed = float("failure" in record) if record else None
    what = f"matching_pursuit, {shape.name} ({shape})"
    note = record.get("failure", record.get("check", ""))
    return [
        Bar(f"{what}: relative error of |x|^2 = |values|^2 + |residual|^2", "<=", ENERGY, units, "fp32 eps"),
        Bar(f"{what}: calls with a clear choice that is not fp64's", "<=", 0, failed, "calls", note),
    ]


def _step(lab: Lab, shape: Shape) -> dict[str, Any]:
    parameters, x, oracle = pursuits.problem(shape)
    check = partial(steps.check, pursuits.expected_gradients(oracle), GRADIENT)
    kinds = {"torch": partial(ResidualStep, pursuits.torch_loop)}
    if lab.peers:
        from benchmarks.peers import overcomplete, sae_lens

        kinds["SAELens"] = sae_lens.SAELensPursuitStep
        kinds["overcomplete"] = overcomplete.OvercompletePursuitStep

    def contender(name: str, kind: Callable[..., PursuitStep], samples: int | None = 3) -> Contender:
        build = partial(kind, parameters, shape.k)
        return steps.contender(name, build, lambda step: step.run(x), check, samples=samples)

    ours = contender(OURS, partial(ResidualStep, encode), None)
    return lab.measure(shape, [ours, *(contender(*one) for one in kinds.items())])


def _work(lab: Lab, shape: Shape, kept: bool) -> Work:
    """By the Gram matrix, the least that is known: x @ dictionary.T, half of the symmetric matrix where it is
    new, and k of its rows a token."""
    N, D, M, k = shape.N, shape.D, shape.M, shape.k
    product = 2.0 * N * D * M + (0.0 if kept else M * M * D)
    once, rows = matrix_bytes((M, D), (N, 2 * D)) + 12 * N * k, matrix_bytes((N * (k - 1), M))
    return Work(once if lab.gpu else once + rows, product + 2.0 * N * k * M, gathered=rows)
