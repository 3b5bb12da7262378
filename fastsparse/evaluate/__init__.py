"""How well an autoencoder describes activations, in numbers: printed, and written as JSON.

``evaluate(EvaluateConfig(...))`` is the whole interface; ``python -m fastsparse evaluate`` calls it. Without
the packages of the ``train`` extra there is :class:`EvaluateConfig` alone.
"""

from fastsparse._extras import explaining, missing
from fastsparse.evaluate.config import EvaluateConfig

__all__ = ["EvaluateConfig", "Evaluation", "evaluate"]

_missing = missing("numpy", "safetensors", "tqdm")

if _missing is None:
    from fastsparse.evaluate.run import Evaluation, evaluate
else:
    __getattr__ = explaining(__name__, _missing, "train", __all__)
