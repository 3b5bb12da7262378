"""Pairs: shards of inputs and of targets, which must hold the same tokens in the same order."""

import json
from pathlib import Path
from typing import Any

from fastsparse.train.shards import Shards

# What may differ between collections of the same tokens.
_OF_THE_PLACE = {"layer", "module", "side", "dtype", "device", "batch_size", "label"}


def aligned(targets: Shards, inputs: Shards) -> Shards:
    """The targets, where they can be those of the inputs: as many shards, of as many rows each.

    Where any two have one name, all must, in the same order; and what ``fastsparse collect`` made must be of
    the same text, read by the same model.

    Raises:
        ValueError: they can't.
    """
    ours, theirs = inputs.shards, targets.shards
    if len(ours) != len(theirs):
        raise ValueError(f"targets: must be as many shards as those of data ({len(ours)}), got {len(theirs)}")
    named_alike = {shard.path.stem for shard in ours} & {shard.path.stem for shard in theirs}
    for mine, other in zip(ours, theirs, strict=True):
        if mine.rows != other.rows:
            raise ValueError(
                f"targets: {other.path} must hold the {mine.rows} rows of {mine.path}, it holds {other.rows}"
            )
        if named_alike and mine.path.stem != other.path.stem:
            raise ValueError(
                "targets: must have the names of data's shards, in their order, got "
                f"{other.path} beside {mine.path}"
            )
        one, another = _recipe(mine.path.parent), _recipe(other.path.parent)
        if one and another and one != another:
            differing = sorted(key for key in one | another if one.get(key) != another.get(key))
            raise ValueError(
                f"targets: {other.path.parent} must be collected from the tokens of {mine.path.parent}, they "
                f"differ in {', '.join(differing)}"
            )
    return targets


def _recipe(folder: Path) -> dict[str, Any] | None:
    """What decided which tokens a collection holds; None where a folder is none."""
    held_out = folder.name == "held_out"
    path = (folder.parent if held_out else folder) / "collection.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        settings = {key: value for key, value in told["settings"].items() if key not in _OF_THE_PLACE}
        return settings | told["from"] | {"held out": held_out}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
