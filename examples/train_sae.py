"""Train a TopK autoencoder on data whose atoms are known, and see how many it finds.

Tokens are sums of 5 of 256 random directions in 64 dimensions. Nobody tells the autoencoder which. For stored
activations of a model, larger than memory, there is `fastsparse train`; this is the same step, by hand.
"""

import sys

import torch
import torch.nn.functional as F

from fastsparse.nn import TopKSAE

D, ATOMS, ACTIVE, LATENTS, BATCH = 64, 256, 5, 320, 512
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 600
RATE = 3e-3

generator = torch.Generator().manual_seed(0)
atoms = F.normalize(torch.randn(ATOMS, D, generator=generator), dim=1)


def tokens(count: int) -> torch.Tensor:
    """(count, D)."""
    chosen = torch.rand(count, ATOMS, generator=generator).topk(ACTIVE, dim=1).indices
    amplitudes = 1 + torch.rand(count, ACTIVE, 1, generator=generator)
    return (amplitudes * atoms[chosen]).sum(dim=1)


def found(sae: TopKSAE) -> float:
    """The share of the true atoms that some latent points along."""
    return ((atoms @ sae.W_dec.T).amax(dim=1) > 0.95).float().mean().item()


sae = TopKSAE(D, LATENTS, ACTIVE, dead_after=50_000, generator=generator)
sae.init_decoder_bias_(tokens(4096))
optimizer = torch.optim.Adam(sae.parameters(), lr=RATE, fused=True)
for step in range(1, STEPS + 1):
    optimizer.param_groups[0]["lr"] = RATE * min(1, 3 * (1 - step / STEPS) + 1e-3)
    optimizer.zero_grad()
    out = sae.loss(tokens(BATCH))
    out.loss.backward()
    sae.after_backward_()  # takes from the gradient what would only change the atoms' norms
    optimizer.step()
    sae.after_step_()
    sae.count_firings_(out.code)  # a latent that stays silent for dead_after tokens is revived by the loss
    if step % max(1, STEPS // 5) == 0:
        print(
            f"step {step}: FVU {out.fvu:.3f}, L0 {out.l0:.1f}, {out.num_dead} of {LATENTS} dead, "
            f"{found(sae):.0%} of the {ATOMS} true atoms found"
        )
