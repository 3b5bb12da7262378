"""How large recurrent weights may be before a GRU's time steps can't be solved for in parallel.

Channels of a GRU whose recurrent weights are normal of a given deviation, and whose pre-activations are
standard normal, run for 2,048 steps. A channel is chaotic where its steps' derivatives are above 1 on
(geometric) average along the sequence: where its Lyapunov exponent is positive. There a rounding error grows
as well, and the states of many steps later are not determined by fp32.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastsparse
from examples.experiments.training import seeded
from fastsparse.reference.gru_recurrence import jacobian, step

SCALES = (0.03, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
SHOWN = (0.5, 2.0, 4.0)  # along time
ITERATIONS = (3, 4, 6)  # of Newton's method, however far it has come


SEARCHED = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)  # deviations of the weights
INPUTS = ("normal", "faint", "quiet, then switched", "slow gates")


class Sizes(NamedTuple):
    steps: int
    channels: int


FULL = Sizes(2048, 512)
QUICK = Sizes(64, 8)


def run(*, quick: bool = False) -> dict[str, Any]:
    sizes = QUICK if quick else FULL
    records = [measured(scale, sizes) for scale in SCALES]
    return {"sizes": sizes._asdict(), "records": records, "apart": [apart(scale, sizes) for scale in SHOWN]}


def problem(scale: float, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """u (1, T, 3, H) and weight (3, H), in fp64 and exact in fp32."""
    generator = seeded(0)
    u = torch.randn(1, sizes.steps, 3, sizes.channels, generator=generator)
    return u.double(), (scale * torch.randn(3, sizes.channels, generator=generator)).double()


def measured(scale: float, sizes: Sizes) -> dict[str, Any]:
    u, weight = problem(scale, sizes)
    h = fastsparse.gru_recurrence(u, weight, solver="sequential")
    chaotic = exponents(h, u, weight) > 0
    record: dict[str, Any] = {"scale": scale, "chaotic": chaotic.double().mean().item()}
    narrow = u.float(), weight.float()
    plain = fastsparse.gru_recurrence(*narrow, solver="sequential")
    for solver in ("newton", "shooting"):
        found, info = fastsparse.gru_recurrence(*narrow, solver=solver, return_info=True)
        certain = info.converged[0]
        record[solver] = {
            "certified": certain.double().mean().item(),
            "certified_of_chaotic": certain[chaotic].double().mean().item() if chaotic.any() else None,
            "mean_passes": info.passes[0, certain].double().mean().item() if certain.any() else None,
            "off_by": largest(found - plain),
            "sequential_off_by": largest((plain.double() - h)[..., certain]) if certain.any() else None,
        }
    record["newton_unchecked"] = {str(n): largest(newton(u, weight, n) - h) for n in ITERATIONS}
    return record


def exponents(h: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    """(H,), the mean over time of log |dh[t] / dh[t - 1]|."""
    return jacobian(before(h), u, weight).abs().clamp_min(1e-300).log().mean(dim=(0, 1))


def newton(u: Tensor, weight: Tensor, iterations: int) -> Tensor:
    """Newton's method with as many iterations as said, converged or not."""
    h = step(torch.zeros_like(u[:, :, 0]), u, weight)
    for _ in range(iterations):
        last = before(h)
        h = h + fastsparse.linear_recurrence(jacobian(last, u, weight), step(last, u, weight) - h)
    return h


def before(h: Tensor) -> Tensor:
    """The states that steps start from; zeros first."""
    return torch.cat((torch.zeros_like(h[:, :1]), h[:, :-1]), dim=1)


def largest(difference: Tensor) -> float | None:
    """None where one isn't finite."""
    found = difference.abs().max().item()
    return found if found < float("inf") else None


def apart(scale: float, sizes: Sizes) -> dict[str, Any]:
    """How far fp32's states have been from fp64's, in the worst channel, up to some sixty times."""
    u, weight = problem(scale, sizes)
    wide = fastsparse.gru_recurrence(u, weight, solver="sequential")
    narrow = fastsparse.gru_recurrence(u.float(), weight.float(), solver="sequential")
    at = sorted({round(sizes.steps ** (i / 59)) - 1 for i in range(60)})
    difference = (narrow.double() - wide).abs().amax(dim=(0, 2)).cummax(0).values[at]
    return {"scale": scale, "steps": [t + 1 for t in at], "largest": difference.tolist()}


def search(
    cell: str,
    solver: str,
    seeds: range,
    steps: int = 512,
    channels: int = 512,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Looks for certified channels that are off from ``sequential``: by scale, how many of how many.

    In fp32 or fp64. ``off`` counts those by more than 32 eps, ``far`` those by more than 64, beside the state
    or 1. To search for longer, take more seeds, or longer sequences.
    """
    eps, records = torch.finfo(dtype).eps, []
    for scale in SEARCHED:
        record = {"scale": scale, "channels": 0, "certified": 0, "off": 0, "far": 0, "most": 0.0}
        for seed in seeds:
            for kind in INPUTS:
                certain, off = _trial(cell, solver, scale, kind, seed, Sizes(steps, channels), dtype)
                off = off[certain] / eps
                record["channels"] += len(certain)
                record["certified"] += len(off)
                record["off"] += int((off > 32).sum())
                record["far"] += int((off > 64).sum())
                record["most"] = max(record["most"], off.max().item() if len(off) else 0.0)
        records.append(record)
    return {"cell": cell, "solver": solver, "seeds": len(seeds), "steps": steps, "records": records}


def _trial(
    cell: str, solver: str, scale: float, kind: str, seed: int, sizes: Sizes, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of every channel whether it was certified, and how far it is from the same step by step."""
    generator = seeded(seed)
    u = torch.randn(1, sizes.steps, 3, sizes.channels, generator=generator)
    if kind == "faint":
        u *= 0.1
    elif kind == "quiet, then switched":
        u *= 1e-3 + 10 * (torch.rand(1, sizes.steps, 1, sizes.channels, generator=generator) < 0.01)
    elif kind == "slow gates":
        shift = 9 * torch.rand(sizes.channels, generator=generator)
        u[:, :, 0] += shift if cell == "lstm" else -shift
    weights = [(scale * torch.randn(rows, sizes.channels, generator=generator)).to(dtype) for rows in (3, 2)]
    u = u.to(dtype)
    if cell == "lstm":
        run = partial(fastsparse.lstm_recurrence, u, *weights)
        *found, info = run(solver=solver, return_info=True)
        plain = run(solver="sequential")
    else:
        run = partial(fastsparse.gru_recurrence, u, weights[0])
        *found, info = run(solver=solver, return_info=True)
        plain = (run(solver="sequential"),)
    apart = [
        ((a - b) / b.abs().clamp_min(1)).abs().amax(dim=(0, 1)) for a, b in zip(found, plain, strict=True)
    ]
    return info.converged[0], torch.stack(apart).amax(dim=0)


def table(result: dict[str, Any]) -> str:
    """Shares of channels, and errors, as Markdown."""
    heads = ["deviation of the weights", "chaotic"]
    heads += [f"certified by {solver} (passes)" for solver in ("newton", "shooting")]
    heads += [f"unchecked: off after {n}" for n in ITERATIONS]
    lines = [f"| {' | '.join(heads)} |", "|" + "---:|" * len(heads)]
    for record in result["records"]:
        cells = [f"{record['scale']:g}", f"{record['chaotic']:.1%}"]
        for solver in ("newton", "shooting"):
            passes = record[solver]["mean_passes"]
            cells.append(
                f"{record[solver]['certified']:.1%}" + ("" if passes is None else f" ({passes:.1f})")
            )
        errors = record["newton_unchecked"].values()
        cells += ["not finite" if error is None else f"{error:.0e}" for error in errors]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], pyplot: Any) -> dict[str, Any]:
    figure, (shares, times) = pyplot.subplots(1, 2, figsize=(7.5, 3), layout="constrained")
    records = result["records"]
    scales = [record["scale"] for record in records]
    for label, color, values in [
        ("certified by shooting", "C0", [record["shooting"]["certified"] for record in records]),
        ("certified by newton", "C1", [record["newton"]["certified"] for record in records]),
        ("not chaotic", "0.5", [1 - record["chaotic"] for record in records]),
    ]:
        shares.plot(scales, values, marker="o", markersize=3, color=color, label=label)
    shares.set_xlabel("deviation of the recurrent weights")
    shares.set_ylabel("share of the channels")
    shares.set_ylim(0, 1.03)
    for curve in result["apart"]:
        floor = [max(value, 1e-9) for value in curve["largest"]]
        times.plot(curve["steps"], floor, label=f"deviation {curve['scale']:g}")
    times.set_xscale("log")
    times.set_yscale("log")
    times.set_xlabel("time step")
    times.set_ylabel("fp32 against fp64 so far, worst channel")
    for each in (shares, times):
        each.grid(linewidth=0.3)
        each.spines[["top", "right"]].set_visible(False)
        each.legend(frameon=False)
    return {"certificates": figure}
