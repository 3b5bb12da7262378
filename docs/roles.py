"""What docstrings and settings say in words of their own, for the pages.

Sphinx's roles become code, the name of a section becomes the one that is understood, and a setting's help,
which the command line shows, becomes its docstring.
"""

import ast
import re

import griffe

_ROLE = re.compile(r":(?:class|func|meth):`~?([^`]+)`")
_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


class Roles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = _EXAMPLE.sub(r"\1Examples:", _ROLE.sub(r"`\1`", obj.docstring.value))

    def on_attribute(self, *, attr: griffe.Attribute, **_: object) -> None:
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "option":
            help, *others = (item for item in value.arguments if not isinstance(item, griffe.ExprKeyword))
            attr.docstring = griffe.Docstring(ast.literal_eval(str(help)), parent=attr)
            attr.value = next(iter(others), None)  # the default
