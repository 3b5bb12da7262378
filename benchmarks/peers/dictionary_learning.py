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

from benchmarks.steps import Parameters, PeerStep


class DictionaryLearningStep(PeerStep):
    transposed = "W_dec"

    def __init__(self, parameters: Parameters, k: int) -> None:
        _stand_in_for_nnsight()
        from dictionary_learning.trainers.top_k import AutoEncoderTopK

        M, D = parameters["W_enc"].shape
        sae = AutoEncoderTopK(D, M, k)
        leaves = {
            "W_enc": sae.encoder.weight, "b_enc": sae.encoder.bias,
            "W_dec": sae.decoder.weight, "b_dec": sae.b_dec,
        }  # fmt: skip
        super().__init__(sae, leaves, parameters)

    def loss(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.module(x), x)


def _stand_in_for_nnsight() -> None:
    if "nnsight" not in sys.modules and importlib.util.find_spec("nnsight") is None:
        module = types.ModuleType("nnsight")
        module.LanguageModel = object
        sys.modules["nnsight"] = module
