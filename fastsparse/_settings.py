"""Settings of a command: the fields of a frozen dataclass, from which its options are made."""

import math
import re
from collections.abc import Sequence
from dataclasses import field, fields
from types import NoneType
from typing import Any, get_args, get_origin

import torch

_DEVICE = re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]*))?")


def option(
    help: str,
    default: Any = ...,
    *,
    least: int = 1,
    choices: Sequence[str] = (),
    affects_result: bool = True,
    positional: bool = False,
) -> Any:
    """A field.

    Args:
        help: for the command line.
        default: none where it must be given.
        least: the smallest whole number that it may be.
        choices: what it may be, where that is a few words.
        affects_result: whether work that is resumed must have the value that it was begun with.
        positional: on the command line.
    """
    about = {"help": help, "least": least, "choices": tuple(choices)}
    about |= {"affects_result": affects_result, "positional": positional}
    return field(metadata=about) if default is ... else field(default=default, metadata=about)


def check(settings: Any) -> None:
    """Check type and range of every field, and make tuples of lists.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range.
    """
    for about in fields(settings):
        value = getattr(settings, about.name)
        if get_origin(about.type) is Sequence:
            if isinstance(value, str) or not all(isinstance(path, str) for path in value):
                raise TypeError(f"{about.name}: must be a list of paths, got {value!r}")
            object.__setattr__(settings, about.name, tuple(value))
        else:
            _check(about.name, value, about.type, about.metadata["least"], about.metadata["choices"])


def _check(name: str, value: Any, kind: Any, least: int, choices: tuple[str, ...]) -> None:
    kinds = set(get_args(kind)) or {kind}
    if float in kinds:
        kinds.add(int)
    if type(value) not in kinds:
        wanted = " or ".join(sorted("None" if kind is NoneType else kind.__name__ for kind in kinds))
        raise TypeError(f"{name}: must be {wanted}, got {value!r}")
    if isinstance(value, float) or (float in kinds and value is not None):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: must be finite and at least 0, got {value}")
    elif type(value) is int and value < least:
        raise ValueError(f"{name}: must be at least {least}, got {value}")
    if choices and value not in choices:
        raise ValueError(f"{name}: must be one of {', '.join(choices)}, got {value!r}")
    if name == "device" and not _DEVICE.fullmatch(value):
        raise ValueError(f"device: must be auto, cpu, cuda or cuda:<number>, got {value!r}")


def differences(was: dict[str, Any], now: dict[str, Any], begun: str) -> None:
    """Refuse to go on with work that was begun with other settings.

    Raises:
        ValueError: a setting differs.
    """
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            raise ValueError(
                f"{name}: must be {was.get(name)!r} to resume from {begun}, got {now.get(name)!r}; "
                "to start anew, name another output folder"
            )


def resolved_device(device: str) -> torch.device:
    """The device that a setting names.

    Raises:
        RuntimeError: CUDA was asked for and can't be used.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = device.partition(":")
    count = torch.cuda.device_count()
    if kind == "cuda" and not (torch.cuda.is_available() and int(number or 0) < count):
        if torch.version.cuda is None:
            reason = "this PyTorch is built without it"
        elif count == 0:
            reason = "no device was found"
        else:
            reason = f"there are {count}, numbered from 0"
        raise RuntimeError(f"device: {device} was asked for and can't be used: {reason}")
    return torch.device(device)
