"""Train a matching pursuit autoencoder, then change k without training again.

Each step explains most of what the steps before left, so that more steps leave less. A TopK autoencoder
scores all latents at once, and more of them than it was trained for do harm. docs/matching_pursuit.md
measures this with care.
"""

import sys

import torch
import torch.nn.functional as F

import fastsparse
from fastsparse.nn import MatchingPursuitSAE, TopKSAE, fvu

D, M, K, BATCH = 32, 128, 4, 256
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 600
RATE = 3e-3

generator = torch.Generator().manual_seed(0)
atoms = F.normalize(torch.randn(M, D, generator=generator), dim=1)


def tokens(count: int) -> torch.Tensor:
    """(count, D): each of M atoms is active with probability K / M, with an exponential amplitude."""
    active = torch.rand(count, M, generator=generator) < K / M
    return (active * torch.empty(count, M).exponential_(generator=generator)) @ atoms


def train(sae: MatchingPursuitSAE | TopKSAE) -> None:
    optimizer = torch.optim.Adam(sae.parameters(), lr=RATE, fused=True)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1, 3 * (1 - step / STEPS))
        optimizer.zero_grad()
        out = sae.loss(tokens(BATCH))
        out.loss.backward()
        sae.after_backward_()
        optimizer.step()
        sae.after_step_()
        sae.count_firings_(out.code)


pursuit, top_k = MatchingPursuitSAE(D, M, K, generator=generator), TopKSAE(D, M, K, generator=generator)
train(pursuit)
train(top_k)
x = tokens(4096)
print(f"both were trained at k = {K}; what they leave unexplained (FVU) of new tokens:")
with torch.no_grad():
    for k in (1, 2, K, 2 * K, 4 * K):
        code = fastsparse.topk_encode(x - top_k.b_dec, top_k.W_enc, top_k.b_enc, k=k)
        left = [fvu(sae.decode(c), x) for sae, c in ((pursuit, pursuit.encode(x, k=k)), (top_k, code))]
        print(f"k = {k:2}: matching pursuit {left[0]:.3f}, TopK {left[1]:.3f}")
    steps = (pursuit.encode(x, k=4 * K, tol=0.5).values > 0).sum(dim=1).float()
    print(f"until a token's residual is below 0.5: {steps.mean():.1f} steps, at most {steps.max():.0f}")
