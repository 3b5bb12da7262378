"""Peak memory of encoding, of rows and of a batch, of training steps, and of matching pursuit with its
gradients, beyond their inputs; among peers, of the libraries' own training steps, with our ops under them and
without: each contender alone in a fresh process, by the kernel's own account.

``python -m benchmarks.bench_memory WORK CONTENDER N D M k threads`` is that process: it prints the growth in
bytes.
"""

import ctypes
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsparse
from benchmarks import bench_encoder_steps, bench_matching_pursuit, data, pursuits, shapes, steps
from benchmarks.bars import Bar, missing
from benchmarks.baselines import torch_batch_encode, torch_encode
from benchmarks.bench_drop_in import MAY, RELAID, THEIRS, TRAINED, Training
from benchmarks.cases import OURS, matrix_bytes, median, short_of_memory
from benchmarks.checks import BatchTopKOracle, PursuitOracle, TopKOracle, close_all
from benchmarks.harness import WrongAnswer
from benchmarks.lab import Job, Lab
from benchmarks.shapes import Given, Shape
from fastsparse import reference

ALLOWED = 5.0  # percent of the N x M matrix in fp32
ALLOWED_UNDER = 35.0  # percent of what the library's own step takes
MORE_STEPS = 4  # times k, at which matching pursuit may take no more than at k
STEPS = "BatchTopK step", "Matryoshka step", "JumpReLU step"  # their gradients included
LIBRARIES = {  # steps as their trainers take them
    "SAELens TopK step": TRAINED["SAELens TopK"],
    "SAELens BatchTopK step": TRAINED["SAELens BatchTopK"],
    "dictionary_learning TopK step": TRAINED["dictionary_learning TopK"]._replace(
        step="DictionaryLearningTrainerStep"
    ),
}
CHECKED = {"encode": 256, "matching_pursuit": 64}  # rows of an answer
ROOT = Path(__file__).parents[1]
TIMEOUT = 600
PAGE = resource.getpagesize()  # what a growth is known to


def jobs(lab: Lab) -> Iterator[Job]:
    if lab.gpu:
        return
    if lab.peers:
        yield from steps_of_libraries(lab)
        return
    encoded, pursued, trained = lab.shapes([shapes.MEMORY, shapes.PURSUIT_STEP, shapes.STEP[0]])
    full = matrix_bytes((encoded.N, encoded.M))
    needs = {OURS: 0.5 * full, "torch": 3 * full}  # torch: the product, its relu, and room
    for work in ("encode", "batch_topk_encode"):
        yield _job(work, encoded, partial(case, work, encoded, needs), partial(_share_of_all, work, encoded))
    for work in STEPS:
        need = 8 * matrix_bytes((trained.N, trained.M)) + 8 * matrix_bytes((trained.M, trained.D))
        yield _job(work, trained, partial(case, work, trained, {OURS: need, "torch": need}))
    yield from pursuits_at_more_steps(pursued)


def _share_of_all(work: str, shape: Shape, case: dict[str, Any]) -> list[Bar]:
    name = f"memory, {work} ({shape}): peak growth over N x M in fp32"
    return [_bar(name, case, lambda: median(case, OURS) / matrix_bytes((shape.N, shape.M)))]


def steps_of_libraries(lab: Lab) -> Iterator[Job]:
    """As they are, and with one line before them, Adam included."""
    (shape,) = lab.shapes([shapes.WIDE_STEP])
    need = 12 * matrix_bytes((shape.N, shape.M)) + 12 * matrix_bytes((shape.M, shape.D))
    needs = {OURS: need, RELAID: need, THEIRS: need}
    for work in LIBRARIES:
        yield _job(work, shape, partial(case, work, shape, needs), partial(_share_of_theirs, work, shape))


def _share_of_theirs(work: str, shape: Shape, case: dict[str, Any]) -> list[Bar]:
    note = missing(case, OURS, THEIRS)
    share = None if note else 100 * median(case, OURS) / median(case, THEIRS)
    name = f"memory, {work} ({shape}): peak growth over that without our ops"
    return [Bar(name, "<", ALLOWED_UNDER, share, unit="%", note=note)]


def pursuits_at_more_steps(shape: Shape) -> Iterator[Job]:
    """Forward and backward at k and at several times k: what is more is what came out."""
    N, M, k = shape.N, shape.M, shape.k
    work = "matching_pursuit, forward and backward"
    first = cache(partial(case, "matching_pursuit", shape, _needs(shape)))
    yield _job(f"{work}, k={k}", shape, first)
    more = replace(shape, k=MORE_STEPS * k)
    full, outputs = matrix_bytes((N, M)), 12 * N * (more.k - k)  # values in fp32, indices in int64
    name = (
        f"memory, matching_pursuit forward + backward ({shape}): growth from k to {MORE_STEPS} k, beyond the "
        "outputs, over N x M in fp32"
    )

    def bars(last: dict[str, Any]) -> list[Bar]:
        failed = last if missing(last, OURS) else first()
        return [_bar(name, failed, lambda: (median(last, OURS) - median(first(), OURS) - outputs) / full)]

    yield _job(f"{work}, k={more.k}", more, partial(case, "matching_pursuit", more, _needs(more)), bars)


def _needs(shape: Shape) -> dict[str, float]:
    """The Gram matrix, the dictionary's gradient, some rows; of the loop a few rows in every step."""
    N, D, M, k = shape.N, shape.D, shape.M, shape.k
    ours = matrix_bytes((M, M), (4 * M, D), (8 * N, D), (N, M))
    return {OURS: ours, "torch": ours + matrix_bytes((4 * k * N, D), (k * M, D))}


def _job(name: str, shape: Shape, run: Callable[[], dict], *bars: Callable[[dict], list[Bar]]) -> Job:
    facts = {"full_matrix": matrix_bytes((shape.N, shape.M))}
    return Job("memory", name, Given(shape, kind="gaussian"), run, *bars, facts=facts)


def _bar(name: str, case: dict[str, Any], share: Callable[[], float]) -> Bar:
    note = missing(case, OURS)
    return Bar(name, "<", ALLOWED, None if note else 100 * share(), unit="%", note=note)


def case(work: str, shape: Shape, need: dict[str, float]) -> dict[str, Any]:
    contenders = {who: _measure(work, who, shape, need[who]) for who in need}
    used = {who: record["median"] for who, record in contenders.items() if "median" in record}
    others = [who for who in used if not who.startswith(OURS)]
    ratios = {
        who: {other: {"of_medians": used[other] / used[who]} for other in others}
        for who in used
        if who not in others
    }
    return {"contenders": contenders, "ratios": ratios}


def _measure(work: str, who: str, shape: Shape, need: float) -> dict[str, Any]:
    if (shortage := short_of_memory(need)) is not None:
        return {"failure": shortage}
    numbers = map(str, (*shape.sizes.values(), torch.get_num_threads()))
    command = [sys.executable, "-m", "benchmarks.bench_memory", work, who, *numbers]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"failure": f"no answer within {TIMEOUT} s"}
    if done.returncode != 0:
        return {"failure": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    growth, verdict = done.stdout.strip().split("\t")
    return {"median": float(growth), "samples": 1, "unit": "bytes", "check": verdict}


def probe(work: str, who: str, shape: Shape) -> tuple[int, str]:
    """The growth of this process's resident peak over one call, and the verdict on the call's answer."""
    warm_up, call, check = WORKS[work](who, shape)
    # Libraries set up thread pools and code caches at their first call: they are not what is asked here.
    warm_up()
    _give_back_free_memory()
    before = _resident("VmRSS")
    # Sets the peak back to the present (proc_pid_clear_refs(5)).
    Path("/proc/self/clear_refs").write_text("5")
    answer = call()
    growth = max(_resident("VmHWM") - before, PAGE)
    return growth, check(answer)


Probe = tuple[Callable[[], Any], Callable[[], Any], Callable[[Any], str]]  # a small call, the call, its check


def _encode(who: str, shape: Shape) -> Probe:
    x, weight, bias = data.tokens(shape, "gaussian"), data.dictionary(shape, "gaussian"), data.bias(shape)
    encode = torch.no_grad()(fastsparse.topk_encode if who == OURS else torch_encode)
    rows = _some(shape, CHECKED["encode"])

    def check(answer: tuple[Tensor, Tensor]) -> str:
        return TopKOracle.of(x[rows], weight, bias, shape.k).check((answer[0][rows], answer[1][rows]))

    small = partial(encode, x[:64].clone(), weight[:1024].clone(), bias[:1024].clone(), k=shape.k)
    return small, partial(encode, x, weight, bias, k=shape.k), check


def _batch_encode(who: str, shape: Shape) -> Probe:
    x, weight, bias = data.tokens(shape, "gaussian"), data.dictionary(shape, "gaussian"), data.bias(shape)
    encode = torch.no_grad()(fastsparse.batch_topk_encode if who == OURS else torch_batch_encode)
    small = partial(encode, x[:64].clone(), weight[:1024].clone(), bias[:1024].clone(), total=64 * shape.k)

    def check(answer: Any) -> str:
        oracle = BatchTopKOracle.of(x, weight, bias, len(x) * shape.k)
        return oracle.check_code(answer) if who == OURS else oracle.check_dense(answer)

    return small, partial(encode, x, weight, bias, total=len(x) * shape.k), check


def _step(name: str, who: str, shape: Shape) -> Probe:
    parameters, x, (ours, dense) = bench_encoder_steps.problem(name, shape)
    build = ours if who == OURS else dense
    step, small = build(parameters, shape.k), build(parameters, shape.k)

    def check(answer: steps.Step) -> str:
        expected = dense(parameters, shape.k).run(x).found()
        return steps.check(expected, bench_encoder_steps.MAY, answer)

    return partial(small.run, x[:64]), partial(step.run, x), check


def _step_of_library(name: str, who: str, shape: Shape) -> Probe:
    """After a step of a few tokens: the optimiser has its state, as it has in all steps but the first."""
    parameters, x = steps.problem(shape)

    def begun(who: str) -> Training:
        training = Training(LIBRARIES[name], parameters, shape.k, who != THEIRS, who == RELAID)
        training.run(x[:64]).forget()
        return training

    def check(answer: steps.Step) -> str:
        return steps.check(begun(THEIRS).run(x).found(), MAY, answer)

    training = begun(who)
    return training.step.forget, partial(training.run, x), check


def _matching_pursuit(who: str, shape: Shape) -> Probe:
    x, dictionary = data.tokens(shape, "gaussian"), data.dictionary(shape, "gaussian")
    encode = pursuits.encode if who == OURS else pursuits.torch_loop

    def differentiated(x: Tensor, dictionary: Tensor) -> tuple[Tensor, ...]:
        leaves = x.requires_grad_(), dictionary.requires_grad_()
        values, indices, residual = encode(*leaves, shape.k)
        gradients = torch.autograd.grad(residual.square().sum() / 2, leaves)
        return values.detach(), indices, residual.detach(), *gradients

    def check(answer: tuple[Tensor, ...]) -> str:
        values, indices, residual, *gradients = answer
        rows = _some(shape, CHECKED["matching_pursuit"])
        oracle = PursuitOracle.of(x.detach()[rows], dictionary.detach(), shape.k, nonnegative=True)
        steps = values.double(), indices, residual.double()
        expected = reference.matching_pursuit_backward(
            *steps, dictionary.detach().double(), torch.zeros_like(steps[0]), steps[2], True, True, True
        )
        verdict = oracle.check((values[rows], indices[rows], residual[rows]))
        right = {"d_x": expected[0], "d_dictionary": expected[1]}
        return f"{verdict}, {close_all(right, bench_matching_pursuit.GRADIENT, gradients)}"

    small = partial(differentiated, x[:64].clone(), dictionary[:1024].clone())
    return small, partial(differentiated, x, dictionary), check


WORKS: dict[str, Callable[[str, Shape], Probe]] = {
    "encode": _encode,
    "batch_topk_encode": _batch_encode,
    "matching_pursuit": _matching_pursuit,
    **{name: partial(_step, name) for name in STEPS},
    **{name: partial(_step_of_library, name) for name in LIBRARIES},
}


def _some(shape: Shape, rows: int) -> Tensor:
    return torch.linspace(0, shape.N - 1, min(shape.N, rows)).long()


def _give_back_free_memory() -> None:
    """Or what malloc holds in reserve would be used up before the process grows, and hide that growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    work, who, *sizes, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    try:
        growth, verdict = probe(work, who, Shape("memory", *map(int, sizes)))
    except WrongAnswer as error:
        raise SystemExit(f"wrong answer: {error}") from None
    print(f"{growth}\t{verdict}")


if __name__ == "__main__":
    main()
