"""overcomplete: ``MpSAE.encode`` (in eval mode, which keeps the normalised dictionary) and its training step.

Every step makes a one-hot N x M matrix and multiplies by it; autograd keeps two of them a step. The package's
own ``__init__`` imports vision models and plots, and with them torchvision, timm, OpenCV and an older
matplotlib; an empty package is put in its place, of which its SAEs, which use none of that, are imported.
"""

from collections.abc import Callable
from functools import cache

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers._stand_in import stand_in_for
from benchmarks.pursuits import PursuitStep
from benchmarks.steps import Parameters, PeerStep


def encoder(dictionary: Tensor, k: int) -> Callable[[Tensor, Tensor, int], Tensor]:
    """What encodes x into codes (N, M) by this dictionary, kept; made at the first call."""
    made = cache(lambda: _sae(dictionary, k).eval())
    return lambda x, same, steps: made().encode(x)[1]


class OvercompletePursuitStep(PursuitStep, PeerStep):
    """Its forward pass normalises the dictionary again, and decodes the codes that it found."""

    def __init__(self, parameters: Parameters, k: int) -> None:
        sae = _sae(parameters["dictionary"], k)
        b_dec = nn.Parameter(parameters["b_dec"])
        super().__init__(sae, {"dictionary": sae.dictionary._weights, "b_dec": b_dec}, parameters)

    def loss(self, x: Tensor) -> Tensor:
        centered = x - self.leaves["b_dec"]
        return F.mse_loss(self.module(centered)[2], centered)


def _sae(dictionary: Tensor, k: int):
    stand_in_for_the_package()
    from overcomplete.sae import MpSAE

    M, D = dictionary.shape
    sae = MpSAE(D, nb_concepts=M, k=k)
    sae.dictionary._weights.data = dictionary.clone()
    return sae


def stand_in_for_the_package() -> None:
    stand_in_for("overcomplete")
