"""Pairs: shards of inputs and of targets, which must hold the same tokens in the same order."""

import json
from pathlib import Path
from typing import Any

from fastsparse.train.shards import Shards

# What may differ between collections of the same tokens.
_OF_THE_PLACE = {"layer", "module", "side", "dtype", "device", "batch_size", "label"}


def aligned(targets: Shards, inputs: Shards) -> Shards:
    """The targets, where they can be those of the inputs: as many shards, of as many rows each.

    Shards of the same names must be in the same order, and those that ``fastsparse collect`` made must be of
    the same text, read by the same model.

    Raises:
        ValueError: they can't.
    """
    ours, theirs = inputs.shards, targets.shards
    if len(ours) != len(theirs):
        raise ValueError(f"targets: must be as many shards as those of data ({len(ours)}), got {len(theirs)}")
    names = [[shard.path.name for shard in side] for side in (ours, theirs)]
    for mine, other in zip(ours, theirs, strict=True):
        if mine.rows != other.rows:
            raise ValueError(
                f"targets: {other.path} must hold the {mine.rows} rows of {mine.path}, it holds {other.rows}"
            )
        if mine.path.name != other.path.name and sorted(names[0]) == sorted(names[1]):
            raise ValueError(f"targets: must be in the order of data, got {other.path} beside {mine.path}")
        recipes = [_recipe(shard.path.parent) for shard in (mine, other)]
        if None not in recipes and recipes[0] != recipes[1]:
            differing = sorted(key for key in recipes[0] if recipes[0][key] != recipes[1].get(key))
            raise ValueError(
                f"targets: {other.path.parent} must be collected from the tokens of {mine.path.parent}, they "
                f"differ in {', '.join(differing)}"
            )
    return targets


def _recipe(folder: Path) -> dict[str, Any] | None:
    """What decided which tokens a collection holds; None where a folder is none."""
    path = (folder.parent if folder.name == "held_out" else folder) / "collection.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        settings = {key: value for key, value in told["settings"].items() if key not in _OF_THE_PLACE}
        return settings | told["from"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
