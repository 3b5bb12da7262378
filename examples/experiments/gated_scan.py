"""Does a gate that costs something open where the causes of what is seen change?

Sequences are made of segments. Each has a hidden cause; every step of it shows the same linear function of
the cause, under fresh noise. A model reads z[t] off a few steps from t on, and a gate beta[t] in (0, 1) off a
few before and after t; it holds a code h[t] = (1 - beta[t]) h[t - 1] + beta[t] z[t], one gate for all
channels, and must make x[t] of h[t], while the mean of beta is penalised. Nothing says where segments begin.
Openings, the steps at which beta exceeds a half, are held against the true boundaries; and the model against
the same with a constant gate.

Source: the switching unit of arXiv 2512.20605; the task is ours.
Rate and cost were chosen by the learnt gate of a seed that isn't among those shown.
"""

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsparse
from examples.experiments.training import WARM_DOWN, seeded

GATES = ("learnt", "constant, same cost", "constant, free")
COST = 0.5  # of the mean of beta, beside the squared error a channel
RATE = 1e-2
TOLERANCE = 1  # steps between an opening and a boundary that count as met


class Sizes(NamedTuple):
    T: int
    D: int  # of what is seen
    causes: int  # their dimension
    shortest: int
    longest: int  # segment
    noises: tuple[float, ...]
    around: int  # how many steps before and after t are read
    width: int
    seeds: int
    steps: int
    batch: int
    held_out: int


FULL = Sizes(128, 16, 4, 8, 24, (0.5, 1.0), 4, 64, seeds=3, steps=1000, batch=32, held_out=256)
QUICK = Sizes(32, 4, 2, 4, 8, (1.0,), 2, 8, seeds=1, steps=3, batch=4, held_out=4)


class Batch(NamedTuple):
    seen: Tensor  # (B, T, D)
    clean: Tensor  # the same without noise
    starts: Tensor  # (B, T) bool, where a segment begins; not at the first step


def sequences(count: int, mixing: Tensor, noise: float, sizes: Sizes, generator: torch.Generator) -> Batch:
    """Segments of uniformly drawn lengths, of normal causes that ``mixing`` (causes, D) shows."""
    most = sizes.T // sizes.shortest + 1
    lengths = torch.randint(sizes.shortest, sizes.longest + 1, (count, most), generator=generator)
    starts = torch.zeros(count, sizes.T, dtype=torch.bool)
    rows, ends = torch.arange(count).unsqueeze(1).expand_as(lengths), lengths.cumsum(dim=1)
    starts[rows[ends < sizes.T], ends[ends < sizes.T]] = True
    causes = torch.randn(count, most + 1, sizes.causes, generator=generator) @ mixing
    clean = causes.take_along_dim(starts.long().cumsum(dim=1).unsqueeze(-1), dim=1)
    return Batch(clean + noise * torch.randn(clean.shape, generator=generator), clean, starts)


class GatedScan(nn.Module):
    """Observations to what the held code makes of them, and the gate."""

    def __init__(self, sizes: Sizes, *, constant: bool, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.read = nn.Conv1d(sizes.D, sizes.width, 2 * sizes.around + 1, padding=sizes.around)
            self.code = nn.Conv1d(sizes.D, sizes.causes, sizes.around + 1)
            self.gate = nn.Linear(sizes.width, 1)
            self.show = nn.Linear(sizes.causes, sizes.D)
        self.constant = nn.Parameter(torch.zeros(())) if constant else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) to (B, T, D) and beta (B, T)."""
        channels = x.transpose(1, 2)
        z = self.code(F.pad(channels, (0, self.code.kernel_size[0] - 1))).transpose(1, 2).contiguous()
        if self.constant is None:
            beta = self.gate(F.gelu(self.read(channels)).transpose(1, 2)).sigmoid()
        else:
            beta = self.constant.sigmoid().expand(*x.shape[:2], 1)
        h = fastsparse.linear_recurrence((1 - beta).expand_as(z), beta * z)
        return self.show(h), beta.squeeze(-1)


def run(*, quick: bool = False) -> dict[str, Any]:
    sizes = QUICK if quick else FULL
    return {
        "sizes": sizes._asdict(), "cost": COST, "tolerance": TOLERANCE,
        "runs": [
            trained(noise, gate, seed, sizes)
            for noise in sizes.noises
            for gate in GATES
            for seed in range(sizes.seeds)
        ],
    }  # fmt: skip


def trained(noise: float, gate: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    model = GatedScan(sizes, constant=gate != "learnt", seed=seed)
    cost = 0.0 if gate == "constant, free" else COST
    mixing = torch.randn(sizes.causes, sizes.D, generator=seeded(1, seed)) / sizes.causes**0.5
    stream, optimizer = seeded(2, seed), torch.optim.Adam(model.parameters(), fused=True)
    for step in range(sizes.steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (sizes.steps - step) / (WARM_DOWN * sizes.steps))
        batch = sequences(sizes.batch, mixing, noise, sizes, stream)
        made, beta = model(batch.seen)
        optimizer.zero_grad()
        (F.mse_loss(made, batch.seen) + cost * beta.mean()).backward()
        optimizer.step()
    held_out = sequences(sizes.held_out, mixing, noise, sizes, seeded(3, seed))
    with torch.no_grad():
        made, beta = model(held_out.seen)
    error, openings = F.mse_loss(made, held_out.seen).item(), beta > 0.5
    openings[:, : sizes.shortest // 2] = False  # the first code is taken in somewhere here
    record = {
        "noise": noise, "gate": gate, "seed": seed, "error": error, "beta": beta.mean().item(),
        "loss": error + COST * beta.mean().item(), "clean_error": F.mse_loss(made, held_out.clean).item(),
        "boundaries": int(held_out.starts.sum()), "openings": int(openings.sum()),
    }  # fmt: skip
    if gate == "learnt":
        record |= met(openings, held_out.starts, TOLERANCE)
        by_chance = met(openings, held_out.starts.roll(1, dims=0), TOLERANCE)
        record |= {f"{name}_by_chance": value for name, value in by_chance.items()}
        record["example"] = {
            "beta": beta[0].tolist(), "starts": held_out.starts[0].nonzero().flatten().tolist(),
        }  # fmt: skip
    return record


def met(openings: Tensor, starts: Tensor, tolerance: int) -> dict[str, float]:
    """Precision and recall of openings, both (B, T) bool, each of which may meet one boundary.

    Boundaries take the first opening within reach that none before has taken: the most that can be met.
    """
    hits = 0
    for opened, begun in zip(openings, starts, strict=True):
        left = opened.nonzero().flatten().tolist()
        for start in begun.nonzero().flatten().tolist():
            while left and left[0] < start - tolerance:
                left.pop(0)
            if left and left[0] <= start + tolerance:
                left.pop(0)
                hits += 1
    return {"precision": hits / max(1, int(openings.sum())), "recall": hits / max(1, int(starts.sum()))}


# ---- what came out ----


def table(result: dict[str, Any]) -> str:
    """Each seed's, as Markdown; in brackets what openings meet of another sequence's boundaries."""
    keys = ("loss", "error", "clean_error", "beta")
    lines = [
        "| noise | gate | loss | error | error without the noise | mean beta | precision | recall |",
        "|---:|---|---|---|---|---|---|---|",
    ]
    for noise, gate in itertools.product(result["sizes"]["noises"], GATES):
        runs = [run for run in result["runs"] if (run["noise"], run["gate"]) == (noise, gate)]
        cells = [", ".join(f"{run[key]:.3f}" for run in runs) for key in keys]
        for name in ("precision", "recall"):
            values = [(run[name], run[f"{name}_by_chance"]) for run in runs if name in run]
            cells.append(", ".join(f"{value:.2f} ({chance:.2f})" for value, chance in values))
        lines.append(f"| {noise:g} | {gate} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], pyplot: Any) -> dict[str, Any]:
    """Beta along the first held-out sequence of the first seed."""
    noises = result["sizes"]["noises"]
    figure, axes = pyplot.subplots(
        len(noises), 1, figsize=(7, 0.6 + 1.4 * len(noises)), layout="constrained", sharex=True, squeeze=False
    )
    for each, noise in zip(axes[:, 0], noises, strict=True):
        example = next(run["example"] for run in result["runs"] if run["noise"] == noise)
        for start in example["starts"]:
            each.axvline(start, color="0.6", linewidth=0.8, linestyle="--")
        each.plot(example["beta"], color="C0", linewidth=1)
        each.set_title(f"noise of {noise:g}")
        each.set_ylim(0, 1.03)
        each.set_ylabel("beta")
        each.grid(linewidth=0.3)
        each.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("step; dashed where a segment begins")
    return {"gated_scan": figure}
