"""Settings of a command: the fields of a frozen dataclass, from which its options are made."""

import math
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, field, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import torch

_DEVICE = re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]*))?")


def option(
    help: str,
    default: Any = MISSING,
    *,
    least: int | None = 1,
    choices: Sequence[str] = (),
    affects_result: bool = True,
    positional: bool = False,
) -> Any:
    """A field.

    Args:
        help: for the command line.
        default: none where it must be given.
        least: the smallest whole number that it may be; None where numbers are checked elsewhere.
        choices: what it may be, where that is a few words.
        affects_result: whether work that is resumed must have the value that it was begun with.
        positional: on the command line.
    """
    about = {"help": help, "least": least, "choices": tuple(choices)}
    about |= {"affects_result": affects_result, "positional": positional}
    return field(default=default, metadata=about)


def settings_of(kind: Any) -> list[Field]:
    """The fields that :func:`option` made."""
    return [about for about in fields(kind) if about.metadata]


def parts(kind: Any) -> tuple[type, bool, bool]:
    """What a field's type says: of what kind a value is, whether there are many, whether None will do.

    Example:
        >>> parts(Sequence[float] | None)
        (<class 'float'>, True, True)
    """
    either = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    (one,) = (part for part in either if part is not NoneType)
    many = get_origin(one) is Sequence
    return get_args(one)[0] if many else one, many, NoneType in either


def check(settings: Any) -> None:
    """Check type and range of every field, and make tuples of lists.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range.
    """
    for about in settings_of(settings):
        name, value, least = about.name, getattr(settings, about.name), about.metadata["least"]
        _check_type(name, value, about.type)
        if isinstance(value, list | tuple):
            object.__setattr__(settings, name, tuple(value))
        elif value is not None and least is not None:
            _check_range(name, value, about.type, least, about.metadata["choices"])


def _check_type(name: str, value: Any, kind: Any) -> None:
    one, many, optional = parts(kind)
    kinds = {one, int} if one is float else {one}
    fits = type(value) in (list, tuple) and all(type(item) in kinds for item in value)
    if not ((fits if many else type(value) in kinds) or (optional and value is None)):
        wanted = " or ".join(sorted(kind.__name__ for kind in kinds))
        wanted = f"{'a list of ' if many else ''}{wanted}{' or None' if optional else ''}"
        raise TypeError(f"{name}: must be {wanted}, got {value!r}")


def _check_range(name: str, value: Any, kind: Any, least: int, choices: tuple[str, ...]) -> None:
    if parts(kind)[0] is float:
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
    for name in now | was:
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
