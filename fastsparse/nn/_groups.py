"""Processes that share a step's tokens."""

from typing import Literal, Union

from torch import distributed

Group = Union["distributed.ProcessGroup", Literal["self"], None]  # PyTorch may be built without it


def counting_group(name: str, group: Group) -> "distributed.ProcessGroup | None":
    """The processes to count with, None for this one alone; which, where there are several, is never guessed.

    Tokens of others that are left out make latents dead that fire, and waiting for processes that don't count
    would hang.
    """
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if group is None and several:
        raise ValueError(
            f"{name}: group must say whose tokens are counted where {distributed.get_world_size()} processes "
            "run: torch.distributed.group.WORLD for data parallelism, 'self' for this process alone; got None"
        )
    if group is None or (isinstance(group, str) and group == "self"):
        return None
    if not isinstance(group, distributed.ProcessGroup):  # such as what new_group returns to other processes
        raise TypeError(
            f"{name}: group must be a process group that this process is in, or 'self', got {group!r}"
        )
    return group
