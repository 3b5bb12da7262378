"""What a call costs by itself: every public function on tiny tensors, beside the plainest PyTorch for it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastsparse
from benchmarks import baselines, data, pursuits
from benchmarks.bars import Bar, speed_bars
from benchmarks.cases import OURS
from benchmarks.checks import close
from benchmarks.harness import Contender
from benchmarks.lab import Job, Lab
from benchmarks.shapes import Given, Sequences, Shape
from fastsparse.nn import ParaGRU, ParaLSTM

TINY = Shape("tiny", 4, 8, 16, 2)
STEPS = Sequences("tiny", 1, 4, 8)
DECODING = Sequences("decoding", 4, 1, 64)
STEP = 1 / 1.2  # how fast a step of decoding must be, beside its plain lines


def _first(answer: Any) -> Tensor:
    return answer if isinstance(answer, Tensor) else answer[0]


@dataclass(frozen=True)
class Call:
    """Two ways to the same numbers, each of which is followed by ``pick`` where answers are compared."""

    name: str
    ours: Callable[[], Any]
    plain: Callable[[], Any]
    pick: Callable[[Any], Tensor] = _first
    shape: Shape | Sequences = TINY
    least: float | None = None  # how many times as fast as the plain lines it must be


def jobs(lab: Lab) -> Iterator[Job]:
    if lab.gpu or lab.peers:
        return
    for call in calls():
        given = Given(call.shape)
        yield Job("tiny_calls", call.name, given, partial(_run, lab, call), partial(_promised, call))


def _run(lab: Lab, call: Call) -> dict[str, Any]:
    with torch.no_grad():
        expected = call.pick(call.plain())

        def check(answer: Any) -> str:
            return close(call.name, call.pick(answer), expected, 1e-5)

        return lab.measure(
            call.shape, [Contender(OURS, call.ours, check), Contender("torch", call.plain, check)]
        )


def _promised(call: Call, case: dict[str, Any]) -> list[Bar]:
    if call.least is None:
        return []
    return speed_bars(f"a tiny call, {call.name}", {"torch": call.least}, case)


def calls() -> Iterator[Call]:
    yield from _of_codes()
    yield from _of_pursuits()
    yield from _of_recurrences()
    yield from _of_steps()


def _of_codes() -> Iterator[Call]:
    k, M = TINY.k, TINY.M
    x, weight, bias = data.tokens(TINY, "gaussian"), data.dictionary(TINY, "gaussian"), data.bias(TINY)
    values, indices = fastsparse.topk_encode(x, weight, bias, k=k)
    total = TINY.N * k

    def above() -> Tensor:
        scores = F.linear(x, weight, bias)
        return scores[torch.nonzero(scores > 0, as_tuple=True)]

    def of_batch() -> Tensor:
        best, places = torch.relu(F.linear(x, weight, bias)).flatten().topk(total)
        return best, places // M, places % M

    def jumped() -> tuple[Tensor, Tensor]:
        off = x <= bias[: TINY.D]
        return x.masked_fill(off, 0), (~off).to(x.dtype)

    yield Call(
        "topk_encode", partial(fastsparse.topk_encode, x, weight, bias, k=k),
        partial(baselines.torch_encode, x, weight, bias, k),
    )  # fmt: skip
    yield Call(
        "batch_topk_encode", partial(fastsparse.batch_topk_encode, x, weight, bias, total=total), of_batch,
        lambda out: out[0].sort().values,
    )  # fmt: skip
    yield Call(
        "threshold_encode", partial(fastsparse.threshold_encode, x, weight, bias), above, _first,
    )  # fmt: skip
    yield Call("jump", partial(fastsparse.jump, x, bias[: TINY.D], 0.1), jumped)
    decode = partial(baselines.torch_decode, values, indices, weight)
    yield Call("spmm", partial(fastsparse.spmm, values, indices, weight), decode, _first)
    yield Call(
        "sparse_decode", partial(fastsparse.sparse_decode, values, indices, weight, x[0]),
        lambda: decode() + x[0], _first,
    )  # fmt: skip
    yield Call(
        "sddmm", partial(fastsparse.sddmm, x, weight, indices),
        partial(baselines.gather_scores, x, weight, indices), _first,
    )  # fmt: skip
    yield Call(
        "spmm_t", partial(fastsparse.spmm_t, values, indices, x, M),
        partial(baselines.index_add, values, indices, x, M), _first,
    )  # fmt: skip


def _of_pursuits() -> Iterator[Call]:
    x, dictionary = data.tokens(TINY, "gaussian"), F.normalize(data.dictionary(TINY, "gaussian"))
    loop = partial(pursuits.torch_loop, x, dictionary, TINY.k)
    yield Call("matching_pursuit", partial(pursuits.encode, x, dictionary, TINY.k), loop)
    step = partial(fastsparse.matching_pursuit_step, x, dictionary, nonnegative=True, normalized=True)
    yield Call("matching_pursuit_step", step, partial(pursuits.torch_step, x, dictionary))


def _of_recurrences() -> Iterator[Call]:
    B, T, H = STEPS.B, STEPS.T, STEPS.H
    a, u, weight, peephole = _spread(B, T, H), _spread(B, T, 3, H), _spread(3, H), _spread(2, H)
    zeros = torch.zeros(B, H)

    def along_time(step: Callable[..., tuple[Tensor, ...]], count: int) -> Tensor:
        state, states = (zeros,) * count, []
        for t in range(T):
            state = step(t, *state)
            states.append(state[0])
        return torch.stack(states, dim=1)

    b = u[:, :, 0]
    linear = partial(along_time, lambda t, h: (a[:, t] * h + b[:, t],), 1)
    yield Call("linear_recurrence", partial(fastsparse.linear_recurrence, a, b), linear, _first, STEPS)
    gru = partial(along_time, lambda t, h: (_gru(u[:, t].unbind(1), weight, h),), 1)
    yield Call("gru_recurrence", partial(fastsparse.gru_recurrence, u, weight), gru, _first, STEPS)
    lstm = partial(along_time, lambda t, h, c: _lstm(u[:, t].unbind(1), weight, peephole, h, c), 2)
    yield Call(
        "lstm_recurrence", partial(fastsparse.lstm_recurrence, u, weight, peephole), lstm, _first, STEPS,
    )  # fmt: skip


def _of_steps() -> Iterator[Call]:
    x = _spread(DECODING.B, DECODING.H)
    generator = torch.Generator().manual_seed(0)
    gru, lstm = (kind(DECODING.H, DECODING.H, generator=generator) for kind in (ParaGRU, ParaLSTM))
    with torch.no_grad():
        (_, h), (_, (h_lstm, c)) = gru.step(x), lstm.step(x)

    def inputs(module: torch.nn.Module) -> Callable[[], tuple[Tensor, ...]]:
        weight, bias = module.weight_ih_l0.detach().flatten(0, 1), module.bias_l0.detach().flatten()
        return lambda: F.linear(x, weight, bias).chunk(3, dim=-1)

    of_gru, of_lstm, weight, lstm_weight, peephole = (
        inputs(gru), inputs(lstm), gru.weight_hh_l0.detach(), lstm.weight_hh_l0.detach(),
        lstm.peephole_l0.detach(),
    )  # fmt: skip
    yield Call(
        "ParaGRU.step", partial(gru.step, x, h), lambda: (_gru(of_gru(), weight, h[0]),),
        shape=DECODING, least=STEP,
    )  # fmt: skip
    yield Call(
        "ParaLSTM.step", partial(lstm.step, x, (h_lstm, c)),
        lambda: _lstm(of_lstm(), lstm_weight, peephole, h_lstm[0], c[0]), shape=DECODING, least=STEP,
    )  # fmt: skip


def _spread(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).view(shape)


def _gru(u: tuple[Tensor, ...], weight: Tensor, h: Tensor) -> Tensor:
    z, r = torch.sigmoid(weight[0] * h + u[0]), torch.sigmoid(weight[1] * h + u[1])
    return h + z * (torch.tanh(weight[2] * h * r + u[2]) - h)


def _lstm(
    u: tuple[Tensor, ...], weight: Tensor, peephole: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, ...]:
    f, g = torch.sigmoid(weight[0] * h + peephole[0] * c + u[0]), torch.tanh(weight[2] * h + u[2])
    c = g + f * (c - g)
    o = torch.sigmoid(weight[1] * h + peephole[1] * c + u[1])
    return o * torch.tanh(c), c
