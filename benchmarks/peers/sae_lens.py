"""SAELens (sae-lens): ``TopKTrainingSAE.training_forward_pass``, the forward of its trainer, and
``loss.backward()``.

Everything as by default. That includes scaling by decoder norms, which for unit rows is the same function
with the same gradients; and dense latents: ``use_sparse_activations=True`` is measured as a contender of its
own. Its W_enc is (D, M), and its loss sums over D where ours takes the mean.
"""

from torch import Tensor

from benchmarks.steps import Parameters, Step


class SAELensStep(Step):
    def __init__(self, parameters: Parameters, k: int, *, use_sparse_activations: bool = False) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.saes.sae import TrainStepInput

        self.k = k
        M, D = parameters.W_enc.shape
        self.scale = float(D)
        self.sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                d_in=D, d_sae=M, k=k, apply_b_dec_to_input=True, use_sparse_activations=use_sparse_activations
            )
        )
        self.leaves = {
            "W_enc": self.sae.W_enc, "b_enc": self.sae.b_enc, "W_dec": self.sae.W_dec, "b_dec":
            self.sae.b_dec,
        }  # fmt: skip
        for name, leaf in self.leaves.items():
            value = getattr(parameters, name)
            leaf.data = (value.T if name == "W_enc" else value).contiguous().clone()
        self.input = TrainStepInput

    def loss(self, x: Tensor) -> Tensor:
        step = self.input(
            sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
        )
        return self.sae.training_forward_pass(step).loss

    def gradients(self) -> dict[str, Tensor]:
        return super().gradients() | {"W_enc": self.leaves["W_enc"].grad.T}
