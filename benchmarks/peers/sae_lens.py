"""SAELens (sae-lens): ``TopKTrainingSAE.training_forward_pass``, as its trainer calls it, and ``backward()``.

By default everything is as SAELens has it: dense latents, and scaling by decoder norms, which for unit rows
is the same function with the same gradients. ``sparse=True`` sets ``use_sparse_activations=True``; on a CPU
its backward needs ``rescale_acts_by_decoder_norm=False`` (else: "Could not run 'aten::view' with arguments
from the 'SparseCPU' backend"). Its W_enc is (D, M), and its loss sums over D where ours takes the mean.

BatchTopK and JumpReLU: their training classes as they are; the latter's penalty is of L0, the mode "step".

Matching pursuit: ``_encode_matching_pursuit``, alone and in ``MatchingPursuitTrainingSAE``, for exactly k
steps, its two ways to stop early turned off.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from benchmarks.pursuits import PursuitStep
from benchmarks.steps import Parameters, PeerStep

NEVER_EARLY = {"residual_threshold": 0.0, "stop_on_duplicate_support": False}


class _TrainingStep(PeerStep):
    """With the loss as its trainer takes it."""

    def __init__(self, sae, leaves: dict[str, Tensor], parameters: Parameters) -> None:
        super().__init__(sae, leaves, parameters)
        self.scale = float(len(parameters["b_dec"]))

    coefficients: Mapping[str, float] = {}

    def loss(self, x: Tensor) -> Tensor:
        from sae_lens.saes.sae import TrainStepInput

        step = TrainStepInput(
            sae_in=x, coefficients=self.coefficients, dead_neuron_mask=None, n_training_steps=0,
            is_logging_step=False,
        )  # fmt: skip
        return self.module.training_forward_pass(step).loss


class SAELensStep(_TrainingStep):
    transposed = "W_enc"

    def __init__(self, parameters: Parameters, k: int, *, sparse: bool = False) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

        M, D = parameters["W_enc"].shape
        config = TopKTrainingSAEConfig(
            d_in=D,
            d_sae=M,
            k=k,
            apply_b_dec_to_input=True,
            use_sparse_activations=sparse,
            rescale_acts_by_decoder_norm=not sparse,
        )
        sae = TopKTrainingSAE(config)
        super().__init__(sae, {name: getattr(sae, name) for name in parameters}, parameters)


class SAELensBatchTopKStep(_TrainingStep):
    """With ``parts`` its Matryoshka: levels of M divided by each of them, and all of it."""

    transposed = "W_enc"

    def __init__(self, parameters: Parameters, k: int, *, parts: Sequence[int] = ()) -> None:
        from sae_lens.saes import batchtopk_sae
        from sae_lens.saes import matryoshka_batchtopk_sae as matryoshka

        M, D = parameters["W_enc"].shape
        options = {"d_in": D, "d_sae": M, "k": k, "apply_b_dec_to_input": True}
        if parts:
            widths = [*(M // part for part in parts), M]
            config = matryoshka.MatryoshkaBatchTopKTrainingSAEConfig(**options, matryoshka_widths=widths)
            sae = matryoshka.MatryoshkaBatchTopKTrainingSAE(config)
        else:
            sae = batchtopk_sae.BatchTopKTrainingSAE(batchtopk_sae.BatchTopKTrainingSAEConfig(**options))
        super().__init__(sae, {name: getattr(sae, name) for name in parameters}, parameters)


class SAELensJumpReLUStep(_TrainingStep):
    transposed = "W_enc"

    def __init__(self, parameters: Parameters, k: int, *, bandwidth: float, penalty: float) -> None:
        from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

        M, D = parameters["W_enc"].shape
        config = JumpReLUTrainingSAEConfig(
            d_in=D, d_sae=M, jumprelu_bandwidth=bandwidth, apply_b_dec_to_input=True
        )
        sae = JumpReLUTrainingSAE(config)
        self.coefficients = {"l0": penalty}
        super().__init__(sae, {name: getattr(sae, name) for name in parameters}, parameters)


def pursue(x: Tensor, dictionary: Tensor, k: int) -> Tensor:
    """Codes (N, M)."""
    from sae_lens.saes.matching_pursuit_sae import _encode_matching_pursuit

    return _encode_matching_pursuit(x, dictionary, max_iterations=k, **NEVER_EARLY)


class SAELensPursuitStep(PursuitStep, _TrainingStep):
    def __init__(self, parameters: Parameters, k: int) -> None:
        from sae_lens.saes.matching_pursuit_sae import (
            MatchingPursuitTrainingSAE,
            MatchingPursuitTrainingSAEConfig,
        )

        M, D = parameters["dictionary"].shape
        config = MatchingPursuitTrainingSAEConfig(
            d_in=D,
            d_sae=M,
            decoder_init_norm=1.0,
            apply_b_dec_to_input=True,
            max_iterations=k,
            **NEVER_EARLY,
        )
        sae = MatchingPursuitTrainingSAE(config)
        super().__init__(sae, {"dictionary": sae.W_dec, "b_dec": sae.b_dec}, parameters)
