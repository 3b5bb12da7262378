"""What a package offers of its modules: a new one is exported because it is there."""

from collections.abc import Callable, Iterable
from importlib import import_module
from pkgutil import iter_modules


def of_modules(package: str, path: Iterable[str]) -> dict[str, Callable]:
    """What each module defines under its own name and, where it does, under ``<name>_backward``."""
    found = {}
    for name in sorted(info.name for info in iter_modules(path)):
        if name.startswith("_"):
            continue
        module = import_module(f"{package}.{name}")
        found[name] = getattr(module, name)
        if hasattr(module, f"{name}_backward"):
            found[f"{name}_backward"] = getattr(module, f"{name}_backward")
    return found
