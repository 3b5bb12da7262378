"""A training step against the same step in plain dense PyTorch: same answer first, then the time."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsparse.nn import TopKSAE
from fastsparse.report import Panel
from fastsparse.report.charts import WIDTH, svg, text

# Rounding may swap two latents whose scores are equal to the last digits. That moves the loss by rounding
# only, and a parameter's gradient by one token's share of it.
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Comparison:
    """Times of interleaved training steps, in seconds, and how far the answers were apart.

    Attributes:
        fastsparse: one time a round.
        dense: one time a round.
        loss_error: relative difference of the losses of the first step.
        gradient_error: largest relative difference (in norm) of a parameter's gradient in the first step.
    """

    fastsparse: list[float]
    dense: list[float]
    loss_error: float
    gradient_error: float

    @property
    def speedup(self) -> float:
        """Ratio of the medians."""
        return statistics.median(self.dense) / statistics.median(self.fastsparse)


def dense_loss(sae: TopKSAE, x: Tensor) -> Tensor:
    """The TopK SAE as a textbook writes it: every pre-activation and every code in full, (N, M)."""
    scores = F.linear(x - sae.b_dec, sae.W_enc, sae.b_enc)
    values, indices = torch.topk(scores, sae.k)
    code = torch.zeros_like(scores).scatter(-1, indices, torch.relu(values))
    reconstruction = code @ sae.W_dec + sae.b_dec
    return (x - reconstruction).square().sum() / (x - x.mean(dim=0)).square().sum()


def sparse_loss(sae: TopKSAE, x: Tensor) -> Tensor:
    """The same by fastsparse."""
    return sae.loss(x).loss


def compare(
    sae: TopKSAE,
    rows: Tensor,
    *,
    batch: int,
    rounds: int,
    lr: float,
    watch: Callable[[list[int]], object] = lambda rounds: rounds,
) -> Comparison:
    """Time whole training steps of both (forward, backward, optimiser, unit norms), one of each a round.

    Args:
        sae: the SAE to start from; it is not changed.
        rows: (N, D) activations on the SAE's device, N >= batch.
        batch: tokens a step.
        rounds: how many steps of each are timed, after one of each that is not.
        lr: learning rate of Adam.
        watch: wraps the rounds, to show progress.

    Returns:
        :class:`Comparison`.

    Raises:
        RuntimeError: loss or gradients differ by more than rounding: then there is nothing to compare.
    """
    contenders = []
    for loss in (sparse_loss, dense_loss):
        own = copy.deepcopy(sae).train()
        own.tokens_since_fired.zero_()  # none dead, and nobody counts: AuxK, which dense has not, stays out
        optimizer = torch.optim.Adam(own.parameters(), lr=lr, fused=True)
        contenders.append((own, loss, optimizer))
    generator = torch.Generator().manual_seed(0)

    def sample() -> Tensor:
        return rows[torch.randint(len(rows), (batch,), generator=generator).to(rows.device)]

    errors = _check([(own, loss) for own, loss, _ in contenders], sample())
    times: tuple[list[float], list[float]] = ([], [])
    for number in watch(list(range(rounds + 1))):
        x = sample()
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            seconds = _time(lambda which=which, x=x: _step(*contenders[which], x), x.device)
            if number > 0:  # the first round warms up
                times[which].append(seconds)
    return Comparison(*times, *errors)


def _step(
    sae: TopKSAE, loss: Callable[[TopKSAE, Tensor], Tensor], optimizer: torch.optim.Adam, x: Tensor
) -> None:
    optimizer.zero_grad()
    loss(sae, x).backward()
    sae.after_backward_()
    optimizer.step()
    sae.after_step_()


def _time(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _check(
    contenders: list[tuple[TopKSAE, Callable[[TopKSAE, Tensor], Tensor]]], x: Tensor
) -> tuple[float, float]:
    """Relative differences of loss and gradients; RuntimeError where they are more than rounding."""
    losses, gradients = [], []
    for sae, loss in contenders:
        value = loss(sae, x)
        value.backward()
        losses.append(value.item())
        gradients.append({name: parameter.grad for name, parameter in sae.named_parameters()})
        sae.zero_grad()
    fast, dense = gradients
    loss_error = abs(losses[0] - losses[1]) / abs(losses[1])
    gradient_error = max(((fast[name] - dense[name]).norm() / dense[name].norm()).item() for name in dense)
    if not (loss_error <= LOSS_TOLERANCE and gradient_error <= GRADIENT_TOLERANCE):
        raise RuntimeError(
            f"fastsparse and dense PyTorch disagree: loss by {loss_error:.1e} (at most {LOSS_TOLERANCE:.0e} "
            f"expected), gradients by {gradient_error:.1e} (at most {GRADIENT_TOLERANCE:.0e} expected)"
        )
    return loss_error, gradient_error


def panel(comparison: Comparison, batch: int) -> Panel:
    """The comparison as a figure of a report."""
    rounds = len(comparison.dense)
    errors = (comparison.loss_error, comparison.gradient_error)
    apart = [f"{error:.0e}" if error else "nothing" for error in errors]
    contenders = [("fastsparse", comparison.fastsparse), ("dense PyTorch", comparison.dense)]
    fast, dense = (milliseconds(statistics.median(times)) for _, times in contenders)
    return Panel(
        "Speed",
        step_bars(contenders),
        f"One training step on {batch:,} tokens: forward, backward, Adam, unit norms. Median and quartiles "
        f"of {rounds} interleaved rounds. Checked first: the losses differ by {apart[0]}, the gradients by "
        f"{apart[1]} (relative).",
        (
            f"{comparison.speedup:.1f}\N{MULTIPLICATION SIGN}",
            "the speed of dense PyTorch",
            f"whole training step: {fast}, dense {dense}, medians of {rounds}, the same answer",
        ),
    )


def step_bars(times: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Median time of a training step by contender, its quartiles as a whisker."""
    top = max(max(statistics.quantiles(seconds, n=4)) for _, seconds in times)
    room = 0.74  # the rest is for the labels
    parts = []
    for row, (name, seconds) in enumerate(times):
        quartiles = statistics.quantiles(seconds, n=4)
        low, median, high = (WIDTH * room * quartile / top for quartile in quartiles)
        y = 60 + 96 * row
        parts += [
            text(0, y - 8, name, "start", "name"),
            f'<rect class="{"bar" if row == 0 else "bar other"}" x="0" y="{y}" '
            f'width="{median:.1f}" height="38" rx="4"/>',
            f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{y + 19}" y2="{y + 19}"/>',
            text(high + 8, y + 24, milliseconds(statistics.median(seconds)), "start", "note"),
        ]
    return svg("Time of a training step", parts)


def milliseconds(seconds: float) -> str:
    """A time with three digits.

    Example:
        >>> milliseconds(0.0412345), milliseconds(1.23456)
        ('41.2 ms', '1,235 ms')
    """
    return f"{1000 * seconds:,.{0 if seconds >= 0.1 else 1}f} ms"
