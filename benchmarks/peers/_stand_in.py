"""Empty packages in the place of those whose own imports need what isn't there."""

import importlib.util
import sys
import types


def stand_in_for(package: str) -> None:
    """Let the modules of a package be imported without what its ``__init__`` imports.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    if package not in sys.modules:
        found = importlib.util.find_spec(package)
        if found is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        module = types.ModuleType(package)
        module.__path__ = found.submodule_search_locations
        sys.modules[package] = module
