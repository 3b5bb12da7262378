"""The functions of docs/api.md, from what their families export: ``python docs/api.py`` writes them."""

import inspect
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

from fastsparse import functional

PAGE = Path(__file__).parent / "api.md"
BY_HAND = "## Modules\n"  # from here on


def page() -> str:
    names = (found.name for found in iter_modules(functional.__path__) if not found.name.startswith("_"))
    families = sorted(map(family, (import_module(f"{functional.__name__}.{name}") for name in names)))
    _, heading, rest = PAGE.read_text().partition(BY_HAND)
    return "# API\n\n" + "\n".join(families) + "\n" + heading + rest


def family(module: ModuleType) -> str:
    """A heading, which is what the docstring says first, and the family's functions, then its classes."""
    exported = [getattr(module, name) for name in module.__all__]
    exported.sort(key=lambda item: (inspect.isclass(item), inspect.getsourcelines(item)[1]))
    lines = (f"::: fastsparse.{item.__name__}\n" for item in exported)
    return f"## {module.__doc__.partition(':')[0]}\n\n{''.join(lines)}"


if __name__ == "__main__":
    PAGE.write_text(page())
