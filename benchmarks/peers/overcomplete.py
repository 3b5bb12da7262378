"""overcomplete: ``MpSAE.encode`` (in eval mode, which keeps the normalised dictionary) and its training step.

Every step makes a one-hot N x M matrix and multiplies by it; autograd keeps two of them a step. The package's
own ``__init__`` imports vision models and plots, and with them torchvision, timm, OpenCV and an older
matplotlib; an empty package is put in its place, of which its SAEs, which use none of that, are imported.
"""

import importlib.util
import sys
import types
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from benchmarks.pursuits import PursuitStep


def encoder(dictionary: Tensor, k: int) -> Callable[[Tensor, Tensor, int], Tensor]:
    """What encodes x into codes (N, M) by this dictionary, kept; made at the first call."""
    made = []

    def encode(x: Tensor, same: Tensor, steps: int) -> Tensor:
        if not made:
            made.append(_sae(dictionary, k).eval())
        return made[0].encode(x)[1]

    return encode


class OvercompletePursuitStep(PursuitStep):
    """Its forward pass normalises the dictionary again, and decodes the codes that it found."""

    def __init__(self, dictionary: Tensor, b_dec: Tensor, k: int) -> None:
        super().__init__(dictionary, b_dec, k)
        self.sae = _sae(dictionary, k)
        self.leaves["dictionary"] = self.sae.dictionary._weights

    def loss(self, x: Tensor) -> Tensor:
        centered = x - self.leaves["b_dec"]
        return F.mse_loss(self.sae(centered)[2], centered)


def _sae(dictionary: Tensor, k: int):
    _stand_in_for_the_package()
    from overcomplete.sae import MpSAE

    M, D = dictionary.shape
    sae = MpSAE(D, nb_concepts=M, k=k)
    sae.dictionary._weights.data = dictionary.clone()
    return sae


def _stand_in_for_the_package() -> None:
    if "overcomplete" not in sys.modules:
        found = importlib.util.find_spec("overcomplete")
        if found is None:
            raise ModuleNotFoundError("No module named 'overcomplete'")
        module = types.ModuleType("overcomplete")
        module.__path__ = found.submodule_search_locations
        sys.modules["overcomplete"] = module
