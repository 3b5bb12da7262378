"""Activations of a model on text, as shards that ``fastsparse train`` reads and text that ``report`` shows.

``collect(CollectConfig(...))`` is the whole interface; ``python -m fastsparse collect`` calls it. Without the
extra's packages there is :class:`CollectConfig` alone, which the command line's help is made from.
"""

from fastsparse._extras import explaining, missing
from fastsparse.collect.config import CollectConfig

__all__ = ["CollectConfig", "Collection", "collect"]

_missing = missing("numpy", "safetensors", "tqdm", "transformers")

if _missing is None:
    from fastsparse.collect.run import Collection, collect
else:
    __getattr__ = explaining(__name__, _missing, "collect", __all__)
