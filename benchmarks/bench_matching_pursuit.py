"""``matching_pursuit``, with a dictionary that is kept and with new ones, and its training step.

Against PyTorch loops (:mod:`benchmarks.pursuits`) and (peers) the SAE libraries; against orthogonal matching
pursuit, which refits all its coefficients in every step, as an encoder of equally many atoms. On a GPU all
make what they need of the dictionary within the timing, as training has to.
"""

from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import fastsparse
from benchmarks import data, pursuits, shapes
from benchmarks.bars import Bar, speed_bar
from benchmarks.cases import OURS, matrix_bytes
from benchmarks.ceilings import Work
from benchmarks.checks import PursuitOracle, close, energy_error
from benchmarks.harness import Contender
from benchmarks.lab import Job, Lab
from benchmarks.pursuits import PursuitStep, Steps
from benchmarks.shapes import Shape

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
FP32 = {"data": "gaussian", "dtype": "fp32"}


def jobs(lab: Lab) -> Iterator[Job]:
    def job(name: str, shape: Shape, run: Callable[..., dict[str, Any]], *rest: Any, **options: Any) -> Job:
        required = options.pop("required", {})
        bars = options.pop("bars", partial(_bars, name, shape, required))
        facts = options.pop("facts", FP32)
        return Job(
            "matching_pursuit", name, shape, partial(run, lab, shape, *rest), bars, facts=facts, **options
        )

    small, wide, step = lab.shapes([shapes.PURSUIT, shapes.WIDE_PURSUIT, shapes.PURSUIT_STEP])
    if lab.gpu:
        for shape, priority in ((wide, 2), (step, 4), (small, 6)):
            yield job(f"{shape.name}, gaussian, {NEW}", shape, case, "gaussian", NEW, priority=priority)
        return
    for kind, what in product(data.KINDS, (KEPT, NEW)):
        required = REQUIRED[what] if kind == "gaussian" else {}
        name, facts = f"{small.name}, {kind}, {what}", FP32 | {"data": kind}
        yield job(name, small, case, kind, what, required=_measured(lab, required), facts=facts)
    if lab.peers:
        yield job(f"{small.name}, gaussian, {KEPT}, signed", small, orthogonal)
    else:
        # Our Gram matrix and the loop's, the scores and rows of theirs, the dictionary and its copies.
        need = 2 * matrix_bytes((wide.M, wide.M), (wide.N, wide.M)) + 4 * matrix_bytes((wide.M, wide.D))
        name = f"{wide.name}, gaussian, {NEW}"
        yield job(name, wide, case, "gaussian", NEW, required=REQUIRED_WIDE, need=need)
        (long,) = lab.shapes([shapes.LONG_PURSUIT])
        yield job(f"{long.name}, gaussian", long, _long, bars=partial(_bars_of_long, long))
    # Autograd's memory for the dense codes of overcomplete: two N x M in every step, and three more at once.
    need = (2 * step.k + 4) * matrix_bytes((step.N, step.M)) if lab.peers else 0.0
    required = REQUIRED_STEP if lab.peers else {}
    yield job(step.name, step, _step, required=required, need=need)


def _measured(lab: Lab, required: dict[str, float]) -> dict[str, float]:
    """Of what is required what this run can tell."""
    return {who: least for who, least in required.items() if (who == GRAM) is not lab.peers}


def _bars(name: str, shape: Shape, required: dict[str, float], case: dict[str, Any]) -> list[Bar]:
    return [
        speed_bar(f"matching_pursuit, {name} ({shape}): against {who}", case, who, least)
        for who, least in required.items()
    ]


def encode(x: Tensor, dictionary: Tensor, k: int, method: str = "auto") -> Steps:
    return fastsparse.matching_pursuit(x, dictionary, k=k, nonnegative=True, normalized=True, method=method)


def _renewed(encode: Callable[..., Any], x: Tensor, dictionary: Tensor, *rest: Any, **options: Any) -> Any:
    pursuits.renew(dictionary)
    return encode(x, dictionary, *rest, **options)


def _settle(x: Tensor, dictionary: Tensor, k: int) -> None:
    """Have the Gram matrix made, which method auto does by itself after some calls with one dictionary."""
    with torch.no_grad():
        encode(x, dictionary, k, method="gram")


@lru_cache(maxsize=1)
def problem(
    shape: Shape, kind: str, device: torch.device, nonnegative: bool = True
) -> tuple[Tensor, Tensor, Tensor, PursuitOracle]:
    """Tokens and dictionary on the device; which rows are checked, and the pursuit of those, on the CPU."""
    x, dictionary = data.tokens(shape, kind), data.dictionary(shape, kind)
    count = min(shape.N, max(64, CHECKED // (shape.k * shape.M)))
    rows = torch.linspace(0, shape.N - 1, count).long()
    oracle = PursuitOracle.of(x[rows], dictionary, shape.k, nonnegative=nonnegative)
    return x.to(device), dictionary.to(device, copy=True), rows.to(device), oracle


def judge(rows: Tensor, oracle: PursuitOracle, steps: Steps) -> str:
    return oracle.check(tuple(part[rows].cpu() for part in steps))


def case(lab: Lab, shape: Shape, kind: str, what: str) -> dict[str, Any]:
    x, dictionary, rows, oracle = problem(shape, kind, lab.device)
    kept = what == KEPT
    check = partial(judge, rows, oracle)

    def of(encoder: Callable[..., Any], tokens: Tensor = x) -> Callable[..., Any]:
        return partial(encoder if kept else partial(_renewed, encoder), tokens, dictionary, shape.k)

    whole = lab.gpu or shape.name == shapes.PURSUIT.name
    variants = {"method": METHODS} if lab.gpu or (whole and not kept and not lab.peers) else {}
    contenders = lab.ours(of(encode), check, **variants)
    if not lab.choice:
        part = x if whole else x[: max(1, shape.N // 4)]  # a loop over all of them takes too long
        loop = partial(_judge_part, rows, oracle, len(part))
        few = {} if whole else {"samples": 3, "share": len(part) / shape.N}
        contenders.append(Contender("torch", of(pursuits.torch_loop, part), loop, **few))
    if lab.torchs:
        gram = pursuits.gram_matrix(dictionary) if kept else None
        of_gram = of(partial(pursuits.torch_gram_loop, gram=gram))
        contenders.append(Contender(GRAM, of_gram, check, samples=None if whole else 1))
        if not lab.quick and (kept or (lab.gpu and shape.headline)):
            torch._dynamo.reset()
            step = torch.compile(pursuits.torch_step, fullgraph=True, dynamic=False)
            compiled = of(partial(pursuits.torch_loop, step=step))
            contenders.append(Contender("torch.compile", compiled, check))
    if lab.libraries and not lab.gpu:
        from benchmarks.peers import overcomplete, sae_lens

        peers = {"SAELens": sae_lens.pursue}
        if kept:
            peers["overcomplete"] = overcomplete.encoder(dictionary, shape.k)
        of_codes = partial(_judge_codes, rows, oracle)
        contenders += [Contender(who, of(encoder), of_codes) for who, encoder in peers.items()]
    if kept:
        _settle(x, dictionary, shape.k)
    with torch.no_grad():
        return lab.measure(shape, contenders, _work(lab, shape, kept))


def _judge_part(rows: Tensor, oracle: PursuitOracle, count: int, steps: Steps) -> str:
    """Of those that see the first tokens alone."""
    inside = rows < count
    return judge(rows[inside], oracle.some(inside.cpu()), steps)


def _judge_codes(rows: Tensor, oracle: PursuitOracle, codes: Tensor) -> str:
    return oracle.check_codes(codes[rows])


def orthogonal(lab: Lab, shape: Shape) -> dict[str, Any]:
    """Signed, as OMP is. Only scikit-learn's takes a Gram matrix that was made before."""
    from benchmarks.peers import scikit_learn, spams

    x, dictionary, rows, oracle = problem(shape, "gaussian", lab.device, nonnegative=False)
    few = min(OMP_ROWS, shape.N)
    ours = partial(fastsparse.matching_pursuit, x, dictionary, k=shape.k, normalized=True)
    theirs = partial(scikit_learn.omp, x[:few], dictionary, shape.k, pursuits.gram_matrix(dictionary))
    of_few = PursuitOracle.of(x[:few], dictionary, shape.k, nonnegative=False).check_orthogonal
    contenders = [
        Contender(OURS, ours, partial(judge, rows, oracle)),
        Contender(
            "SPAMS OMP", partial(spams.omp, x, dictionary, shape.k),
            lambda codes: oracle.check_orthogonal(codes[rows]),
        ),
        Contender("scikit-learn OMP", theirs, of_few, samples=3, share=few / shape.N),
    ]  # fmt: skip
    _settle(x, dictionary, shape.k)
    with torch.no_grad():
        return lab.measure(shape, contenders)


def _long(lab: Lab, shape: Shape) -> dict[str, Any]:
    """Hundreds of steps: is the energy still accounted for, and every choice fp64's?"""
    x, dictionary, rows, oracle = problem(shape, "gaussian", lab.device)
    found: list[Steps] = []

    def keep() -> Steps:
        found.append(encode(x, dictionary, shape.k))
        return found[-1]

    with torch.no_grad():
        case = lab.measure(shape, [Contender(OURS, keep, partial(judge, rows, oracle))])
    return case | {"energy_error": energy_error(x, found[-1][0], found[-1][2]) if found else None}


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
    x, dictionary, b_dec, oracle = pursuits.problem(shape)
    check = partial(check_step, *pursuits.expected_gradients(oracle))
    kinds = {OURS: pursuits.FastsparsePursuitStep, "torch": pursuits.TorchPursuitStep}
    if lab.peers:
        from benchmarks.peers import overcomplete, sae_lens

        kinds["SAELens"] = sae_lens.SAELensPursuitStep
        kinds["overcomplete"] = overcomplete.OvercompletePursuitStep
    contenders = [
        # Built at the first call, within the harness: a peer that can't be imported is reported.
        Contender(
            name, partial(_run_step, cache(partial(build, dictionary, b_dec, shape.k)), x), check,
            samples=None if name == OURS else 3,
        )
        for name, build in kinds.items()
    ]  # fmt: skip
    return lab.measure(shape, contenders)


def _run_step(build: Callable[[], PursuitStep], x: Tensor) -> PursuitStep:
    return build().run(x)


def check_step(loss: Tensor, gradients: dict[str, Tensor], step: PursuitStep) -> str:
    verdicts = [close("loss", step.last_loss / step.scale, loss, GRADIENT)]
    got = step.gradients()
    for name, gradient in gradients.items():
        verdicts.append(close(f"d_{name}", got[name] / step.scale, gradient, GRADIENT))
    return ", ".join(verdicts)


def _work(lab: Lab, shape: Shape, kept: bool) -> Work:
    """By the Gram matrix, the least that is known: x @ dictionary.T, half of the symmetric matrix where it is
    new, and k of its rows a token."""
    N, D, M, k = shape.N, shape.D, shape.M, shape.k
    product = 2.0 * N * D * M + (0.0 if kept else M * M * D)
    once, rows = matrix_bytes((M, D), (N, 2 * D)) + 12 * N * k, matrix_bytes((N * (k - 1), M))
    return Work(once if lab.gpu else once + rows, product + 2.0 * N * k * M, gathered=rows)
