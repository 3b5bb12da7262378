"""The models that can be trained, and their options: what a constructor takes, said by its docstring."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, make_dataclass
from functools import cache
from inspect import Parameter, getdoc, signature
from typing import Any

from fastsparse._settings import check, option
from fastsparse.nn import (
    BatchTopKSAE,
    Crosscoder,
    CrossLayerTranscoder,
    GatedSAE,
    GroupSparseSAE,
    JumpReLUSAE,
    MatchingPursuitSAE,
    ReLUSAE,
    TopKSAE,
    Transcoder,
)

MODELS = {
    "topk": TopKSAE, "batchtopk": BatchTopKSAE, "jumprelu": JumpReLUSAE, "gated": GatedSAE, "relu": ReLUSAE,
    "mp": MatchingPursuitSAE, "transcoder": Transcoder, "crosscoder": Crosscoder,
    "clt": CrossLayerTranscoder, "groupsparse": GroupSparseSAE,
}  # fmt: skip

# Said by the run: its data, its sizes, its seed, its device.
_OF_THE_RUN = {
    "d_model", "d_in", "d_out", "num_sources", "num_layers", "num_modalities", "num_latents", "device",
    "dtype", "generator",
}  # fmt: skip
# Whose options others take over, and explain: no option has two meanings.
_EXPLAIN = (TopKSAE, BatchTopKSAE, JumpReLUSAE)


@cache
def options_of(model: str) -> type:
    """The options of a model: a frozen dataclass, which checks their types; ranges are its constructor's."""
    kind = MODELS[model]
    help = {
        name: text
        for about in (*_EXPLAIN[::-1], kind)
        for name, text in _arguments(getdoc(about) or "").items()
    }
    taken = [
        (name, about.annotation, option(help.get(name, ""), _default(about), least=None))
        for name, about in signature(kind, eval_str=True).parameters.items()
        if name not in _OF_THE_RUN
    ]
    about = {"__doc__": (getdoc(kind) or "").partition("\n")[0], "__post_init__": check}
    return make_dataclass(f"{kind.__name__}Options", taken, namespace=about, frozen=True, kw_only=True)


def settled(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a model: those that are given, the others as by default.

    Raises:
        TypeError: one has the wrong type.
        ValueError: the model has no such option, or must be given one that is not there.
    """
    kind = options_of(model)
    default = {about.name: about.default for about in fields(kind)}
    for name in options:
        if name not in default:
            raise ValueError(f"options: those of the model {model} are {', '.join(default)}, got {name!r}")
    for name, value in default.items():
        if value is MISSING and name not in options:
            raise ValueError(f"options: the model {model} must be given {name}, got {list(options)}")
    return vars(kind(**options)).copy()


def in_words(model: str, told: Mapping[str, Any]) -> str:
    """The options that are not as by default, of a mapping that holds others too.

    Example:
        >>> in_words("topk", {"k": 32, "groups": 4, "prefixes": [], "seed": 1})
        'k = 32, groups = 4'
    """
    own = {about.name: about.default for about in fields(options_of(model))}
    values = {name: tuple(v) if isinstance(v := told.get(name, own[name]), list) else v for name in own}
    return ", ".join(f"{name} = {value}" for name, value in values.items() if value != own[name])


def _default(about: Parameter) -> Any:
    return MISSING if about.default is Parameter.empty else about.default


def _arguments(doc: str) -> dict[str, str]:
    """What a docstring says of each argument, without its marks."""
    section = re.search(r"^Args:\n((?: .*\n?)+)", doc, re.MULTILINE)
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE)
    plain = {names: re.sub(r"(:\w+:)?`+", "", " ".join(text.split())).rstrip(".") for names, text in entries}
    return {name: text for names, text in plain.items() for name in names.split(", ")}
