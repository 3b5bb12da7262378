"""Configurations: JSON objects that others wrote, every option that is read checked."""

import json
from pathlib import Path
from typing import Any

_NEEDED = object()

# Why options are refused that several formats have.
NO_SKIP = "no model here adds a product with its input"
NO_TRANSCODER = "the output of a transcoder is another activation than its input"


class Config:
    """The options of a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file holds no JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._under = path, ""
        try:
            self._values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path}: must be there beside the weights, there is no such file"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: must be JSON, got {path.read_bytes()[:40]!r}") from error
        if not isinstance(self._values, dict):
            raise ValueError(f"{path}: must be a JSON object, got {_told(self._values)}")

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def get(self, name: str, kind: type, default: Any = _NEEDED) -> Any:
        """An option of a type; null is none.

        Raises:
            ValueError: it is missing and has no default, or has another type.
        """
        if name not in self:
            if default is _NEEDED:
                raise ValueError(
                    f"{self.path}: must say {self._under}{name}, it says {', '.join(self._values)}"
                )
            return default
        value = self._values[name]
        if type(value) not in ((int, float) if kind is float else (kind,)):
            raise self.wrong(name, f"of type {kind.__name__}")
        return value

    def only(self, name: str, *accepted: Any, default: Any = _NEEDED, why: str = "") -> Any:
        """An option that must be one of these.

        Raises:
            ValueError: it is missing and has no default, or is another.
        """
        if name not in self and default is not _NEEDED:
            return default
        value = self._values.get(name)
        if value not in accepted:
            raise self.wrong(name, " or ".join(map(_told, accepted)), why)
        return value

    def wrong(self, name: str, wanted: str, why: str = "") -> ValueError:
        """What to raise of an option that is not as it must be."""
        because = f": {why}" if why else ""
        return ValueError(
            f"{self.path}: {self._under}{name} must be {wanted}, got {_told(self._values.get(name))}{because}"
        )

    def part(self, name: str) -> "Config":
        """The options within an option."""
        inner = object.__new__(Config)
        inner.path, inner._under = self.path, f"{self._under}{name}."
        inner._values = self.get(name, dict)
        return inner


def _told(value: Any) -> str:
    """As in the file."""
    return json.dumps(value)[:80]
