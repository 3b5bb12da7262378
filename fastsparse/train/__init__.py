"""Training sparse autoencoders on activations larger than memory, with bit-for-bit resumption.

``train(TrainConfig(...))`` is the whole interface; ``python -m fastsparse train`` calls it.
"""

from importlib.util import find_spec

for _package in ("numpy", "safetensors", "tqdm"):
    if find_spec(_package) is None:
        raise ModuleNotFoundError(
            f"fastsparse.train needs {_package}, which is not installed: "
            "pip install 'fastsparse-torch[train]'",
            name=_package,
        )

from fastsparse.train.checkpoint import load_sae  # noqa: E402
from fastsparse.train.config import TrainConfig  # noqa: E402
from fastsparse.train.loop import Metrics, TrainingInterrupted, TrainResult, train  # noqa: E402

__all__ = ["Metrics", "TrainConfig", "TrainResult", "TrainingInterrupted", "load_sae", "train"]
