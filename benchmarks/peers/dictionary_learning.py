"""dictionary_learning: ``AutoEncoderTopK.forward``, the model that its ``TopKTrainer`` trains; and the losses
of that, of its ``BatchTopKTrainer`` and ``JumpReluTrainer``.

Its decoder is an ``nn.Linear`` with weight (D, M). The package imports nnsight for its activation buffers;
that drags in torchvision and another torch, and patches einops, math and parts of torch for the whole
process, so an empty stand-in is put in its place. The SAE doesn't use it.
"""

import importlib
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


class DictionaryLearningTrainerStep(PeerStep):
    """With the loss as its TopKTrainer takes it: activations, pre-activations, what fired."""

    transposed = "W_dec"
    kind = "top_k", "TopKTrainer"

    def __init__(self, parameters: Parameters, k: int) -> None:
        _stand_in_for_nnsight()
        place, name = self.kind
        made = getattr(importlib.import_module(f"dictionary_learning.trainers.{place}"), name)
        M, D = parameters["W_enc"].shape
        self.scale = float(D)  # it sums over D
        self.trainer = made(1, D, M, k, layer=0, lm_name="none", device="cpu", warmup_steps=0)
        sae = self.trainer.ae
        leaves = {
            "W_enc": sae.encoder.weight, "b_enc": sae.encoder.bias,
            "W_dec": sae.decoder.weight, "b_dec": sae.b_dec,
        }  # fmt: skip
        super().__init__(sae, leaves, parameters)

    def loss(self, x: Tensor) -> Tensor:
        return self.trainer.loss(x, step=1001)  # it follows the threshold from then on


class DictionaryLearningBatchTopKStep(DictionaryLearningTrainerStep):
    kind = "batch_top_k", "BatchTopKTrainer"


class DictionaryLearningJumpReLUStep(PeerStep):
    transposed = "W_enc"

    def __init__(self, parameters: Parameters, k: int, *, bandwidth: float) -> None:
        _stand_in_for_nnsight()
        from dictionary_learning.trainers.jumprelu import JumpReluTrainer

        M, D = parameters["W_enc"].shape
        self.scale = float(D)
        self.trainer = JumpReluTrainer(
            2, D, M, layer=0, lm_name="none", bandwidth=bandwidth, target_l0=float(k), warmup_steps=0,
            sparsity_warmup_steps=0,
        )  # fmt: skip
        sae = self.trainer.ae
        super().__init__(sae, {name: getattr(sae, name) for name in parameters}, parameters)

    def loss(self, x: Tensor) -> Tensor:
        return self.trainer.loss(x, step=1)


def _stand_in_for_nnsight() -> None:
    if "nnsight" not in sys.modules and importlib.util.find_spec("nnsight") is None:
        module = types.ModuleType("nnsight")
        module.LanguageModel = object
        sys.modules["nnsight"] = module
