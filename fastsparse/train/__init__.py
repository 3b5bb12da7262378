"""Training sparse autoencoders on activations larger than memory, with bit-for-bit resumption.

``train(TrainConfig(...))`` is the whole interface; ``python -m fastsparse train`` calls it. Without the
extra's packages there is :class:`TrainConfig` alone, which the command line's help is made from.
"""

from importlib.util import find_spec

from fastsparse.train.config import TrainConfig

_missing = next((name for name in ("numpy", "safetensors", "tqdm") if find_spec(name) is None), None)

if _missing is None:
    from fastsparse.train.checkpoint import load_sae
    from fastsparse.train.loop import Metrics, TrainingInterrupted, TrainResult, train
else:

    def __getattr__(name: str) -> None:
        if name in __all__:
            raise ModuleNotFoundError(
                f"fastsparse.train needs {_missing}, which is not installed: "
                "pip install 'fastsparse-torch[train]'",
                name=_missing,
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Metrics", "TrainConfig", "TrainResult", "TrainingInterrupted", "load_sae", "train"]
