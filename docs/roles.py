"""What the docstrings say in words of their own, for the pages: Sphinx's roles, and the name of a section."""

import re

import griffe

_ROLE = re.compile(r":(?:class|func|meth):`~?([^`]+)`")
_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


class Roles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = _EXAMPLE.sub(r"\1Examples:", _ROLE.sub(r"`\1`", obj.docstring.value))
