"""SAELens (sae-lens): ``TopKTrainingSAE.training_forward_pass``, as its trainer calls it, and ``backward()``.

By default everything is as SAELens has it: dense latents, and scaling by decoder norms, which for unit rows
is the same function with the same gradients. ``sparse=True`` sets ``use_sparse_activations=True``; on a CPU
its backward needs ``rescale_acts_by_decoder_norm=False`` (else: "Could not run 'aten::view' with arguments
from the 'SparseCPU' backend"). Its W_enc is (D, M), and its loss sums over D where ours takes the mean.
"""

from torch import Tensor

from benchmarks.steps import NAMES, Parameters, Step


class SAELensStep(Step):
    def __init__(self, parameters: Parameters, k: int, *, sparse: bool = False) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.saes.sae import TrainStepInput

        self.k = k
        M, D = parameters.W_enc.shape
        self.scale = float(D)
        config = TopKTrainingSAEConfig(
            d_in=D,
            d_sae=M,
            k=k,
            apply_b_dec_to_input=True,
            use_sparse_activations=sparse,
            rescale_acts_by_decoder_norm=not sparse,
        )
        self.sae = TopKTrainingSAE(config)
        self.leaves = {name: getattr(self.sae, name) for name in NAMES}
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
