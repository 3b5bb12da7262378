"""Training sparse autoencoders on activations larger than memory, with bit-for-bit resumption.

``train(TrainConfig(...))`` is the whole interface; ``python -m fastsparse train`` calls it. Without the
extra's packages there is :class:`TrainConfig` alone, which the command line's help is made from.
"""

from fastsparse._extras import explaining, missing
from fastsparse.train.config import TrainConfig

__all__ = ["Metrics", "TrainConfig", "TrainResult", "TrainingInterrupted", "load_sae", "train"]

_missing = missing("numpy", "safetensors", "tqdm")

if _missing is None:
    from fastsparse.train.checkpoint import load_sae
    from fastsparse.train.loop import Metrics, TrainingInterrupted, TrainResult, train
else:
    __getattr__ = explaining(__name__, _missing, "train", __all__)
