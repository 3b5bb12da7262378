"""Training steps of encoders whose codes are ragged, forward, backward, all gradients: BatchTopK, BatchTopK
with prefixes (Matryoshka), and JumpReLU, each as its module's ``loss``; against dense steps in PyTorch and
(peers) the training libraries' own. And ReLU at several densities, by entries and in stripes.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import shapes, steps
from benchmarks.bars import speed_bars
from benchmarks.cases import matrix_bytes
from benchmarks.ceilings import Work, products
from benchmarks.harness import Contender
from benchmarks.lab import Job, Lab
from benchmarks.shapes import Given, Shape, each
from benchmarks.steps import Parameters, PeerStep, Step
from fastsparse.nn import BatchTopKSAE, JumpReLUSAE, ReLUSAE, SparseAutoencoder
from fastsparse.nn.fvu import spread_of

REQUIRED = {"SAELens": 5.0, "dictionary_learning": 5.0}
PREFIXES = 16, 8, 4, 2  # parts of M: the levels are five
PLAIN = "no prefixes"  # ours too
DENSITIES = 0.05, 0.1, 0.2, 0.4  # of ReLU's codes
BANDWIDTH, PENALTY = 0.05, 0.5  # of JumpReLU; the penalty of an L0 of 1 beside squared errors summed over D
# Relative to a gradient's norm: where two scores of the batch differ by a rounding, a swapped entry moves it.
MAY = 2e-2


class ModuleStep(PeerStep):
    """One of our modules; its loss is of the fraction of variance, which ``scale`` takes back."""

    def __init__(self, sae: SparseAutoencoder, parameters: Parameters) -> None:
        names = {"threshold": "raw_threshold"}  # of the linear form
        leaves = {name: getattr(sae, names.get(name, name)) for name in parameters}
        super().__init__(sae, leaves, parameters)

    def loss(self, x: Tensor) -> Tensor:
        self.scale = float(x.numel() / spread_of(x))
        return self.module.loss(x).loss


def batch_topk(parameters: Parameters, k: int, prefixes: tuple[int, ...] = ()) -> ModuleStep:
    M, D = parameters["W_enc"].shape
    return ModuleStep(BatchTopKSAE(D, M, k, prefixes=prefixes), parameters)


def jump_relu(parameters: Parameters, k: int, x: Tensor) -> ModuleStep:
    M, D = parameters["W_enc"].shape
    weight = PENALTY * len(x) / float(spread_of(x))
    options = {"bandwidth": BANDWIDTH, "threshold_form": "linear", "penalty_weight": weight}
    return ModuleStep(JumpReLUSAE(D, M, dense="sparse", **options), parameters)


class DenseBatchTopKStep(Step):
    """What people write in plain PyTorch; with prefixes a product for each."""

    def __init__(self, parameters: Parameters, k: int, prefixes: tuple[int, ...] = ()) -> None:
        super().__init__(parameters, k)
        self.prefixes = (*prefixes, len(parameters["W_enc"]))

    def loss(self, x: Tensor) -> Tensor:
        p = self.leaves
        scores = torch.relu(F.linear(x - p["b_dec"], p["W_enc"], p["b_enc"])).flatten()
        values, places = scores.topk(self.k * len(x), sorted=False)
        code = torch.zeros_like(scores).scatter(0, places, values).view(len(x), -1)
        levels = (code[:, :m] @ p["W_dec"][:m] + p["b_dec"] for m in self.prefixes)
        return sum(F.mse_loss(level, x) for level in levels)


class _Jump(torch.autograd.Function):
    """f = z H(z - theta), and the gate; Rajamanoharan et al. 2024, arXiv 2407.14435, equations 11 and 12."""

    @staticmethod
    def forward(ctx, z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, theta)
        gate = (z > theta).to(z.dtype)
        return z * gate, gate

    @staticmethod
    def backward(ctx, d_f: Tensor, d_gate: Tensor) -> tuple[Tensor, Tensor]:
        z, theta = ctx.saved_tensors
        near = (z - theta).abs() < BANDWIDTH / 2
        return d_f * (z > theta), -(near * (theta * d_f + d_gate) / BANDWIDTH).sum(dim=0)


class DenseJumpReLUStep(Step):
    def loss(self, x: Tensor) -> Tensor:
        p = self.leaves
        f, gate = _Jump.apply(F.linear(x - p["b_dec"], p["W_enc"], p["b_enc"]), p["threshold"])
        error = F.mse_loss(f @ p["W_dec"] + p["b_dec"], x)
        return error + PENALTY / x.shape[1] * gate.sum() / len(x)


class DenseReLUStep(Step):
    def loss(self, x: Tensor) -> Tensor:
        p = self.leaves
        f = torch.relu(F.linear(x - p["b_dec"], p["W_enc"], p["b_enc"]))
        return F.mse_loss(f @ p["W_dec"] + p["b_dec"], x)


def relu(parameters: Parameters, k: int, dense: str) -> ModuleStep:
    M, D = parameters["W_enc"].shape
    return ModuleStep(ReLUSAE(D, M, l1=0.0, dense=dense), parameters)


def jobs(lab: Lab) -> Iterator[Job]:
    if lab.choice or lab.gpu:
        return
    (shape,) = lab.shapes(shapes.STEP[:1])
    (given,) = each(0, [shape], "fp32")
    need = 16 * matrix_bytes((shape.M, shape.D)) + 8 * matrix_bytes((shape.N, shape.M))
    required = REQUIRED if lab.peers else {}
    for name in ("BatchTopK step", "JumpReLU step"):
        bars = partial(speed_bars, f"{name} ({shape})", required)
        yield Job("encoder_steps", name, given, partial(case, lab, given, name), bars, need)
    if not lab.peers:
        name = "Matryoshka step"
        bars = partial(speed_bars, f"{name} ({shape})", {PLAIN: 1 / 1.5})
        yield Job("encoder_steps", name, given, partial(case, lab, given, name), bars, need)
        for density in DENSITIES:
            name = f"ReLU step, density {density:.0%}"
            run = partial(by_density, lab, given, density)
            yield Job("encoder_steps", name, given, run, need=2 * need)


def by_density(lab: Lab, given: Given, density: float) -> dict[str, Any]:
    """One bias for all latents, that this share of the scores is above."""
    shape = given.shape
    parameters, x = steps.problem(shape, lab.device)
    bias = -_threshold({**parameters, "b_enc": 0 * parameters["b_enc"]}, x, round(density * shape.M))
    parameters = {**parameters, "b_enc": bias}
    check = partial(steps.check, DenseReLUStep(parameters, shape.k).run(x).found(), MAY)

    def contender(who: str, kind: Callable[..., Step]) -> Contender:
        return steps.contender(who, partial(kind, parameters, shape.k), lambda step: step.run(x), check)

    own = contender("own", partial(relu, dense="sparse"))
    contenders = [*lab.ours(own.run, check), contender("in stripes", partial(relu, dense="stripes"))]
    contenders.append(contender("torch", DenseReLUStep))
    return lab.measure(shape, contenders, Work(4 * matrix_bytes((shape.M, shape.D))))


Kinds = tuple[Callable[..., Step], Callable[..., Step]]  # ours, and the dense one


def problem(name: str, shape: Shape, device: torch.device | str = "cpu") -> tuple[Parameters, Tensor, Kinds]:
    """Parameters and tokens of a step, and what does it."""
    parameters, x = steps.problem(shape, device)
    if name == "JumpReLU step":
        x = x - parameters["b_dec"]  # which dictionary_learning doesn't take from its input
        parameters = {**parameters, "b_dec": torch.zeros_like(parameters["b_dec"])}
        parameters["threshold"] = _threshold(parameters, x, shape.k)
        return parameters, x, (partial(jump_relu, x=x), DenseJumpReLUStep)
    prefixes = tuple(shape.M // part for part in PREFIXES) if name == "Matryoshka step" else ()
    kinds = partial(batch_topk, prefixes=prefixes), partial(DenseBatchTopKStep, prefixes=prefixes)
    return parameters, x, kinds


def case(lab: Lab, given: Given, name: str) -> dict[str, Any]:
    shape = given.shape
    parameters, x, (ours, dense) = problem(name, shape, lab.device)
    expected = dense(parameters, shape.k).run(x).found()

    def contender(who: str, kind: Callable[..., Step], right: dict[str, Tensor] = expected):
        check = partial(steps.check, right, MAY)
        return steps.contender(who, partial(kind, parameters, shape.k), lambda step: step.run(x), check)

    own = contender("own", ours)
    contenders = lab.ours(own.run, own.check)
    if name == "Matryoshka step":
        right = DenseBatchTopKStep(parameters, shape.k).run(x).found()
        contenders.append(contender(PLAIN, batch_topk, right))
    contenders.append(contender("torch", dense))
    for who, kind, names in _peers(lab, name):
        contenders.append(contender(who, kind, {key: expected[key] for key in names or expected}))
    N, D, M, k = shape.N, shape.D, shape.M, shape.k
    product = 2.0 * N * D * M
    least = 4 * matrix_bytes((M, D)) + 2 * matrix_bytes((N, D))
    contenders += products(x, parameters["W_enc"])
    return lab.measure(shape, contenders, Work(least, product + 8 * N * k * D, product))


def _threshold(parameters: Parameters, x: Tensor, k: int) -> Tensor:
    """(M,) one for all latents, that k scores of a token are above on average, and none is close to."""
    scores = F.linear(x - parameters["b_dec"], parameters["W_enc"], parameters["b_enc"])
    around = scores.flatten().topk(k * len(x) + 1).values[-2:]
    return around.mean().expand(scores.shape[1]).clone()


def _peers(lab: Lab, name: str) -> list[tuple[str, Callable[..., Step], tuple[str, ...]]]:
    """Steps of the training libraries, and which of the gradients they define as we do; none for all."""
    if not lab.peers:
        return []
    from benchmarks.peers import dictionary_learning, sae_lens

    if name == "BatchTopK step":
        return [
            ("SAELens", sae_lens.SAELensBatchTopKStep, ()),
            ("dictionary_learning", dictionary_learning.DictionaryLearningBatchTopKStep, ()),
        ]
    # dictionary_learning takes no b_dec from its input, has another penalty, and applies the step to f.
    shared = ("d_W_enc", "d_b_enc", "d_W_dec")
    return [
        ("SAELens", partial(sae_lens.SAELensJumpReLUStep, bandwidth=BANDWIDTH, penalty=PENALTY), ()),
        (
            "dictionary_learning",
            partial(dictionary_learning.DictionaryLearningJumpReLUStep, bandwidth=BANDWIDTH),
            shared,
        ),
    ]
