"""What a training run is asked to do. The command line is made from these fields and their help."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from fastsparse._settings import check, option, resolved_device
from fastsparse.nn import MatchingPursuitSAE, TopKSAE

MODELS = {"topk": TopKSAE, "mp": MatchingPursuitSAE}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a training run depends on; for its fields see ``python -m fastsparse train --help``.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range.

    Example:
        >>> from fastsparse.train import TrainConfig
        >>> TrainConfig(data=["activations/"], output="runs/a", num_latents=16384, k=32).learning_rate
        0.0002
    """

    data: Sequence[str] = option(
        "shards of activations (N, D), .npy or .safetensors: files, folders or globs",
        affects_result=False, positional=True,
    )  # fmt: skip
    output: str = option("folder for checkpoints and log.jsonl; resumed if it has any", affects_result=False)
    num_latents: int = option("M, the number of latents")
    k: int = option("active latents a token")
    model: str = option(
        "topk, or mp: matching pursuit, whose one dictionary takes k steps a token", "topk", choices=[*MODELS]
    )
    steps: int = option(
        "optimiser steps in all, those before a resume included", 10_000, affects_result=False
    )
    batch_size: int = option("tokens a step", 4096)
    lr: float | None = option("Adam's learning rate (default: 2e-4 / sqrt(num_latents / 2^14))", None)
    warmup_steps: int = option("steps of linear warm-up from 0", 0, least=0)
    decay_steps: int = option("last steps, over which the rate falls linearly to 0", 0, least=0)
    aux_k: int | None = option(
        "dead latents a token in the auxiliary loss; 0: none (default: topk about D / 2, mp k)", None, least=0
    )
    aux_weight: float = option("weight of the auxiliary loss", 1 / 32)
    dead_after: int = option("tokens without a value but 0 after which a latent is dead", 10_000_000)
    bf16: bool = option("compute under bfloat16 autocast; parameters stay float32", False)
    seed: int = option("seed of the initial atoms and of the order of the data", 0, least=0)
    device: str = option(
        "auto, cpu, cuda, or one GPU of several, such as cuda:1", "auto", affects_result=False
    )
    tensor: str | None = option("name of the tensor to read in .safetensors shards that hold several", None)
    block_tokens: int = option("neighbouring tokens that are read together", 256)
    buffer_tokens: int = option("tokens held in memory and shuffled together, twice over", 2**17)
    log_every: int = option("steps between lines of the log", 10, affects_result=False)
    checkpoint_every: int = option("steps between checkpoints", 1000, affects_result=False)
    keep_checkpoints: int = option("how many of the newest checkpoints to keep", 2, affects_result=False)

    def __post_init__(self) -> None:
        check(self)
        if self.model == "topk" and self.k > self.num_latents:
            raise ValueError(f"k: must be at most num_latents ({self.num_latents}), got {self.k}")
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps + decay_steps: must be at most steps ({self.steps}), "
                f"got {self.warmup_steps} + {self.decay_steps}"
            )

    @property
    def learning_rate(self) -> float:
        """The peak rate; its default follows Gao et al. 2024, arXiv 2406.04093, section 3.2 and figure 3."""
        return self.lr if self.lr is not None else 2e-4 / math.sqrt(self.num_latents / 2**14)

    def rate_at(self, step: int) -> float:
        """The rate of one step, the first being 1. Without decay it is the same whatever ``steps`` is."""
        warmup = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        left = self.steps - step + 1
        decay = min(1.0, left / (self.decay_steps + 1)) if self.decay_steps else 1.0
        return self.learning_rate * warmup * decay

    def result_fields(self) -> dict[str, Any]:
        """What determines the trained weights, besides the data: a resumed run must agree in all of it."""
        chosen = {o.name: getattr(self, o.name) for o in fields(self) if o.metadata["affects_result"]}
        chosen["lr"] = self.learning_rate
        chosen["device"] = resolved_device(self.device).type
        if self.decay_steps:
            chosen["steps"] = self.steps
        return chosen
