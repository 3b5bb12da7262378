"""A recurrence of your own, solved for all time steps at once.

The cell is a leaky integrator with a nonlinear leak. `newton_recurrence` needs its step and nothing else: no
scan, no derivative by hand. States and gradients are the loop's; by them the leak is then learnt.
"""

import sys

import torch
from torch import Tensor

import fastsparse

B, T, H = 4, 256, 8
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 60

generator = torch.Generator().manual_seed(0)
x = torch.randn(B, T, H, generator=generator)
start = torch.zeros(B, H)
true_leak = torch.linspace(0.3, 1.2, H)


def step(leak: Tensor, h: Tensor, x: Tensor) -> Tensor:
    """From states (B, T', H) and inputs to the next states."""
    return h - leak * torch.tanh(h) + 0.5 * torch.sigmoid(h) * x


def loop(leak: Tensor) -> Tensor:
    h, states = start, []
    for t in range(T):
        h = step(leak, h, x[:, t])
        states.append(h)
    return torch.stack(states, dim=1)


def solved(leak: Tensor) -> tuple[Tensor, fastsparse.NewtonInfo]:
    return fastsparse.newton_recurrence(lambda h, x: step(leak, h, x), x, start)


target, (h, info) = loop(true_leak), solved(true_leak)
print(
    f"{T} steps in {int(info.iterations.max())} iterations, {info.converged.float().mean():.0%} of channels "
    f"converged; states are off from the loop's by {(h - target).abs().max():.0e}"
)
leak = torch.full((H,), 0.6, requires_grad=True)
expected, gradient = (
    torch.autograd.grad((states - target).square().mean(), leak)[0]
    for states in (loop(leak), solved(leak)[0])
)
print(f"gradients are off by {(gradient - expected).abs().max() / expected.abs().max():.0e} of the largest")

optimizer = torch.optim.Adam([leak], lr=0.03)
for _ in range(STEPS):
    optimizer.zero_grad()
    (solved(leak)[0] - target).square().mean().backward()
    optimizer.step()
print(f"leaks learnt in {STEPS} steps: {', '.join(f'{v:.2f}' for v in leak.tolist())}")
print(f"               the true ones: {', '.join(f'{v:.2f}' for v in true_leak.tolist())}")
