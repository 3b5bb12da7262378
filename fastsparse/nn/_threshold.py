"""The threshold that a model has in training, followed over its steps, by which it can encode afterwards."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, distributed

from fastsparse._validation import check_tolerance
from fastsparse.nn._groups import Group, counting_group
from fastsparse.nn._linear_encoder import LinearEncoder
from fastsparse.nn.jump_relu_sae import JumpReLUSAE, with_thresholds
from fastsparse.nn.sparse_autoencoder import Code, Firings


class Thresholded(LinearEncoder):
    """Keeps an exponential moving average of what the least positive value of a step was.

    Attributes:
        threshold: scalar fp32 buffer, whatever the dtype of the parameters; 0 before the first step with a
            positive value, which it begins with.
    """

    threshold: Tensor
    _wide = ("threshold",)

    def __init__(
        self, *sizes: int, threshold_decay: float, device: torch.device | str | None, **options: Any
    ) -> None:
        super().__init__(*sizes, device=device, **options)
        check_tolerance(self._name, "threshold_decay", threshold_decay)
        if threshold_decay >= 1:
            raise ValueError(f"{self._name}: threshold_decay must be below 1, got {threshold_decay}")
        self.threshold_decay = threshold_decay
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32, device=device))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new atoms, and start again from them."""
        super().reset_parameters(generator)
        self.threshold.zero_()

    def count_firings_(self, code: Code | Firings, *, group: Group = None) -> None:
        """As :meth:`SparseAutoencoder.count_firings_`, and follow the threshold."""
        super().count_firings_(code, group=group)
        self._follow(self._least_positive(code), counting_group(f"{self._name}.count_firings_", group))

    def export_threshold(self) -> JumpReLUSAE:
        """The same autoencoder with its latents above ``threshold``, whatever the batch and their number.

        Returns:
            A :class:`JumpReLUSAE` with copies of the parameters, whose thresholds are not trained.

        Raises:
            RuntimeError: no training step with a positive value has been counted.
            ValueError: latents are chosen by their absolute scores.
        """
        if self._activation != "relu":
            raise ValueError(
                f"{self._name}.export_threshold: activation must be 'relu', got {self._activation!r}"
            )
        if not bool(self.threshold > 0):
            raise RuntimeError(
                f"{self._name}.export_threshold: threshold must be known, got 0: count_firings_ follows it "
                "in training"
            )
        return with_thresholds(self, self.W_enc, self.b_enc, self.threshold.expand(self.num_latents))

    @abstractmethod
    def _least_positive(self, code: Code | Firings) -> Tensor:
        """(2,) fp32: the sum of what a step says about the threshold, and how many say so."""

    @torch.no_grad()
    def _follow(self, told: Tensor, group: "distributed.ProcessGroup | None") -> None:
        if group is not None:
            distributed.all_reduce(told, group=group)
        total, count = told
        step = torch.where(
            self.threshold > 0, self.threshold.lerp(total / count, 1 - self.threshold_decay), total / count
        )
        self.threshold.copy_(torch.where(count > 0, step, self.threshold))
