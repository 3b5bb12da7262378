"""SAELens (sae-lens): ``TopKTrainingSAE.training_forward_pass``, as its trainer calls it, and ``backward()``.

By default everything is as SAELens has it: dense latents, and scaling by decoder norms, which for unit rows
is the same function with the same gradients. ``sparse=True`` sets ``use_sparse_activations=True``; on a CPU
its backward needs ``rescale_acts_by_decoder_norm=False`` (else: "Could not run 'aten::view' with arguments
from the 'SparseCPU' backend"). Its W_enc is (D, M), and its loss sums over D where ours takes the mean.

Matching pursuit: ``_encode_matching_pursuit``, alone and in ``MatchingPursuitTrainingSAE``, for exactly k
steps, its two ways to stop early turned off.
"""

from torch import Tensor

from benchmarks.pursuits import PursuitStep
from benchmarks.steps import NAMES, Parameters, Step


class SAELensStep(Step):
    def __init__(self, parameters: Parameters, k: int, *, sparse: bool = False) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

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

    def loss(self, x: Tensor) -> Tensor:
        return _training_loss(self.sae, x)

    def gradients(self) -> dict[str, Tensor]:
        return super().gradients() | {"W_enc": self.leaves["W_enc"].grad.T}


def pursue(x: Tensor, dictionary: Tensor, k: int) -> Tensor:
    """Codes (N, M)."""
    from sae_lens.saes.matching_pursuit_sae import _encode_matching_pursuit

    return _encode_matching_pursuit(
        x, dictionary, residual_threshold=0.0, max_iterations=k, stop_on_duplicate_support=False
    )


class SAELensPursuitStep(PursuitStep):
    def __init__(self, dictionary: Tensor, b_dec: Tensor, k: int) -> None:
        from sae_lens.saes.matching_pursuit_sae import (
            MatchingPursuitTrainingSAE,
            MatchingPursuitTrainingSAEConfig,
        )

        super().__init__(dictionary, b_dec, k)
        M, D = dictionary.shape
        self.scale = float(D)
        config = MatchingPursuitTrainingSAEConfig(
            d_in=D,
            d_sae=M,
            decoder_init_norm=1.0,
            apply_b_dec_to_input=True,
            residual_threshold=0.0,
            max_iterations=k,
            stop_on_duplicate_support=False,
        )
        self.sae = MatchingPursuitTrainingSAE(config)
        self.sae.W_dec.data, self.sae.b_dec.data = dictionary.clone(), b_dec.clone()
        self.leaves = {"dictionary": self.sae.W_dec, "b_dec": self.sae.b_dec}

    def loss(self, x: Tensor) -> Tensor:
        return _training_loss(self.sae, x)


def _training_loss(sae, x: Tensor) -> Tensor:
    """As its trainer takes it."""
    from sae_lens.saes.sae import TrainStepInput

    step = TrainStepInput(
        sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )
    return sae.training_forward_pass(step).loss
