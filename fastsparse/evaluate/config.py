"""What is evaluated on what. The command line is made from these fields and their help."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastsparse._settings import check, option


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Everything that an evaluation depends on; for its fields see ``python -m fastsparse evaluate --help``.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range.

    Example:
        >>> from fastsparse.evaluate import EvaluateConfig
        >>> EvaluateConfig(run="runs/first", data=["held_out/"]).batch_size
        4096
    """

    run: str = option("folder of a training run, for its newest checkpoint, or a checkpoint", positional=True)
    data: Sequence[str] = option(
        "shards of activations (N, D), .npy or .safetensors: files, folders or globs"
    )
    tensor: str | None = option("which tensor to read in safetensors files with several", None)
    output: str | None = option("the figures as JSON (default: evaluation.json in the run's folder)", None)
    batch_size: int = option("tokens at a time", 4096)
    max_tokens: int | None = option("read so many tokens and no more", None)
    device: str = option("auto, cpu, cuda, or one GPU of several, such as cuda:1", "auto")

    def __post_init__(self) -> None:
        check(self)
