"""What belongs to an extra: looked for without importing it, and explained where it is missing."""

from collections.abc import Callable
from importlib.util import find_spec


def missing(*packages: str) -> str | None:
    """The first of some packages that is not installed."""
    return next((name for name in packages if find_spec(name) is None), None)


def explaining(module: str, package: str, extra: str, names: list[str]) -> Callable[[str], None]:
    """A module's ``__getattr__``, for the names that it has with an extra's packages alone."""

    def explain(name: str) -> None:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        raise lacking(module, package, extra)

    return explain


def lacking(module: str, package: str, extra: str) -> ModuleNotFoundError:
    """What to raise where a package of an extra is needed and not there."""
    advice = f"pip install 'fastsparse-torch[{extra}]'"
    return ModuleNotFoundError(f"{module} needs {package}, which is not installed: {advice}", name=package)
