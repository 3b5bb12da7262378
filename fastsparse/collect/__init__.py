"""Activations of a model on text, as shards that ``fastsparse train`` reads and text that ``report`` shows.

``collect(CollectConfig(...))`` is the whole interface; ``python -m fastsparse collect`` calls it. Without the
extra's packages there is :class:`CollectConfig` alone, which the command line's help is made from.
"""

from importlib.util import find_spec

from fastsparse.collect.config import CollectConfig

_needed = ("numpy", "safetensors", "tqdm", "transformers")
_missing = next((name for name in _needed if find_spec(name) is None), None)

if _missing is None:
    from fastsparse.collect.run import Collection, collect
else:

    def __getattr__(name: str) -> None:
        if name in __all__:
            raise ModuleNotFoundError(
                f"fastsparse.collect needs {_missing}, which is not installed: "
                "pip install 'fastsparse-torch[collect]'",
                name=_missing,
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["CollectConfig", "Collection", "collect"]
