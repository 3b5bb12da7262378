"""What a training run is asked to do. The command line is made from these fields and their help."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastsparse._settings import check, option, resolved_device, settings_of
from fastsparse.train.models import MODELS, settled


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a training run depends on; for its fields see ``python -m fastsparse train --help``.

    Attributes:
        options: of the model, by name: the arguments of its class in :mod:`fastsparse.nn`, whose ranges that
            checks when training begins. On the command line they stand beside the others.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range, or the model has no such option.

    Example:
        >>> from fastsparse.train import TrainConfig
        >>> options = {"k": 32, "prefixes": [1024, 4096]}
        >>> config = TrainConfig(data=["activations/"], output="a", num_latents=16384, options=options)
        >>> config.learning_rate, config.all_options()["aux_weight"]
        (0.0002, 0.03125)
    """

    data: Sequence[str] = option(
        "shards of activations (N, D), or (N, L, D), .npy or .safetensors: files, folders or globs",
        affects_result=False, positional=True,
    )  # fmt: skip
    targets: Sequence[str] = option(
        "for models that make one thing of another, such as transcoders: shards of what is to be made of the "
        "data, as many, with the same tokens in the same order", (), affects_result=False,
    )  # fmt: skip
    output: str = option("folder for checkpoints and log.jsonl; resumed if it has any", affects_result=False)
    num_latents: int = option("M, the number of latents")
    model: str = option(
        "which autoencoder; --help after it shows the options of its own", "topk", choices=[*MODELS]
    )
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = option(
        "optimiser steps in all, those before a resume included", 10_000, affects_result=False
    )
    batch_size: int = option("tokens a step", 4096)
    lr: float | None = option("Adam's learning rate (default: 2e-4 / sqrt(num_latents / 2^14))", None)
    warmup_steps: int = option("steps of linear warm-up from 0", 0, least=0)
    decay_steps: int = option("last steps, over which the rate falls linearly to 0", 0, least=0)
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
        if not isinstance(self.options, Mapping):
            raise TypeError(f"options: must map names to values, got {self.options!r}")
        object.__setattr__(self, "options", dict(self.options))
        self.all_options()
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

    def all_options(self) -> dict[str, Any]:
        """Those of the model, the ones that are as by default too."""
        return settled(self.model, self.options)

    def result_fields(self) -> dict[str, Any]:
        """What determines the trained weights, besides the data: a resumed run must agree in all of it."""
        chosen = {o.name: getattr(self, o.name) for o in settings_of(self) if o.metadata["affects_result"]}
        chosen |= self.all_options()
        chosen["lr"] = self.learning_rate
        chosen["device"] = resolved_device(self.device).type
        if self.decay_steps:
            chosen["steps"] = self.steps
        return chosen
