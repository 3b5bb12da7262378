"""What a training run is asked to do. The command line is made from these fields and their help."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, get_args

import torch

from fastsparse.nn import MatchingPursuitSAE, TopKSAE


def _option(help: str, default: Any = ..., *, affects_result: bool = True) -> Any:
    """A field; ``affects_result``: a resumed run must have the value that the checkpoint was made with."""
    metadata = {"help": help, "affects_result": affects_result}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


MODELS = {"topk": TopKSAE, "mp": MatchingPursuitSAE}
_DEVICE = re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]*))?")
_MAY_BE_ZERO = ("warmup_steps", "decay_steps", "aux_k", "seed")


def _check(name: str, value: Any, kind: Any) -> None:
    """Type and range of one field."""
    kinds = set(get_args(kind)) or {kind}
    if float in kinds:
        kinds.add(int)
    if type(value) not in kinds:
        wanted = " or ".join(sorted("None" if kind is NoneType else kind.__name__ for kind in kinds))
        raise TypeError(f"{name}: must be {wanted}, got {value!r}")
    if isinstance(value, float) or (float in kinds and value is not None):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: must be finite and at least 0, got {value}")
    elif type(value) is int:
        least = 0 if name in _MAY_BE_ZERO else 1
        if value < least:
            raise ValueError(f"{name}: must be at least {least}, got {value}")


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

    data: Sequence[str] = _option(
        "shards of activations (N, D), .npy or .safetensors: files, folders or globs", affects_result=False
    )
    output: str = _option("folder for checkpoints and log.jsonl; resumed if it has any", affects_result=False)
    num_latents: int = _option("M, the number of latents")
    k: int = _option("active latents a token")
    model: str = _option("topk, or mp: matching pursuit, whose one dictionary takes k steps a token", "topk")
    steps: int = _option(
        "optimiser steps in all, those before a resume included", 10_000, affects_result=False
    )
    batch_size: int = _option("tokens a step", 4096)
    lr: float | None = _option("Adam's learning rate (default: 2e-4 / sqrt(num_latents / 2^14))", None)
    warmup_steps: int = _option("steps of linear warm-up from 0", 0)
    decay_steps: int = _option("last steps, over which the rate falls linearly to 0", 0)
    aux_k: int | None = _option(
        "dead latents a token in the auxiliary loss; 0: none (default: topk about D / 2, mp k)", None
    )
    aux_weight: float = _option("weight of the auxiliary loss", 1 / 32)
    dead_after: int = _option("tokens without a value but 0 after which a latent is dead", 10_000_000)
    bf16: bool = _option("compute under bfloat16 autocast; parameters stay float32", False)
    seed: int = _option("seed of the initial atoms and of the order of the data", 0)
    device: str = _option(
        "auto, cpu, cuda, or one GPU of several, such as cuda:1", "auto", affects_result=False
    )
    tensor: str | None = _option("name of the tensor to read in .safetensors shards that hold several", None)
    block_tokens: int = _option("neighbouring tokens that are read together", 256)
    buffer_tokens: int = _option("tokens held in memory and shuffled together, twice over", 2**17)
    log_every: int = _option("steps between lines of the log", 10, affects_result=False)
    checkpoint_every: int = _option("steps between checkpoints", 1000, affects_result=False)
    keep_checkpoints: int = _option("how many of the newest checkpoints to keep", 2, affects_result=False)

    def __post_init__(self) -> None:
        if isinstance(self.data, str) or not all(isinstance(path, str) for path in self.data):
            raise TypeError(f"data: must be a list of paths, got {self.data!r}")
        object.__setattr__(self, "data", tuple(self.data))
        for option in fields(self):
            if option.name != "data":
                _check(option.name, getattr(self, option.name), option.type)
        if self.model not in MODELS:
            raise ValueError(f"model: must be one of {', '.join(MODELS)}, got {self.model!r}")
        if self.model == "topk" and self.k > self.num_latents:
            raise ValueError(f"k: must be at most num_latents ({self.num_latents}), got {self.k}")
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps + decay_steps: must be at most steps ({self.steps}), "
                f"got {self.warmup_steps} + {self.decay_steps}"
            )
        if not _DEVICE.fullmatch(self.device):
            raise ValueError(f"device: must be auto, cpu, cuda or cuda:<number>, got {self.device!r}")

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

    def resolved_device(self) -> torch.device:
        """The device to train on.

        Raises:
            RuntimeError: CUDA was asked for and can't be used.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        kind, _, number = self.device.partition(":")
        count = torch.cuda.device_count()
        if kind == "cuda" and not (torch.cuda.is_available() and int(number or 0) < count):
            if torch.version.cuda is None:
                reason = "this PyTorch is built without it"
            elif count == 0:
                reason = "no device was found"
            else:
                reason = f"there are {count}, numbered from 0"
            raise RuntimeError(f"device: {self.device} was asked for and can't be used: {reason}")
        return torch.device(self.device)

    def result_fields(self) -> dict[str, Any]:
        """What determines the trained weights, besides the data: a resumed run must agree in all of it."""
        chosen = {o.name: getattr(self, o.name) for o in fields(self) if o.metadata["affects_result"]}
        chosen["lr"] = self.learning_rate
        chosen["device"] = self.resolved_device().type
        if self.decay_steps:
            chosen["steps"] = self.steps
        return chosen
