"""dictionary_learning: ``AutoEncoderTopK.forward``, the model that its ``TopKTrainer`` trains.

Its decoder is an ``nn.Linear`` with weight (D, M). The package imports nnsight for its activation buffers;
that drags in torchvision and another torch, and patches einops, math and parts of torch for the whole
process, so an empty stand-in is put in its place. The SAE doesn't use it.
"""

import importlib.util
import sys
import types

import torch.nn.functional as F
from torch import Tensor

from benchmarks.steps import Parameters, Step


class DictionaryLearningStep(Step):
    def __init__(self, parameters: Parameters, k: int) -> None:
        _stand_in_for_nnsight()
        from dictionary_learning.trainers.top_k import AutoEncoderTopK

        self.k = k
        M, D = parameters.W_enc.shape
        self.sae = AutoEncoderTopK(D, M, k)
        self.leaves = {
            "W_enc": self.sae.encoder.weight, "b_enc": self.sae.encoder.bias,
            "W_dec": self.sae.decoder.weight, "b_dec": self.sae.b_dec,
        }  # fmt: skip
        for name, leaf in self.leaves.items():
            value = getattr(parameters, name)
            leaf.data = (value.T if name == "W_dec" else value).contiguous().clone()

    def loss(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.sae(x), x)

    def gradients(self) -> dict[str, Tensor]:
        return super().gradients() | {"W_dec": self.leaves["W_dec"].grad.T}


def _stand_in_for_nnsight() -> None:
    if "nnsight" not in sys.modules and importlib.util.find_spec("nnsight") is None:
        module = types.ModuleType("nnsight")
        module.LanguageModel = object
        sys.modules["nnsight"] = module
