"""The command line: ``python -m fastsparse collect``, ``train``, ``evaluate``, ``report``, ``info``."""

import argparse
import importlib
import io
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import MISSING
from functools import partial
from typing import Any

from fastsparse import __version__
from fastsparse._settings import parts, settings_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 1 (an error, explained), 2 (usage), 128 + signal."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path may hold letters that a terminal has not: they are no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        parser = _parser(arguments)
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{options.hint}")
        return options.do(options)
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        print(f"fastsparse: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"fastsparse: {str(error) or 'interrupted; run the same command again'}", file=sys.stderr)
        return 128 + getattr(error, "signal_number", signal.SIGINT)


# By command: its settings, which are imported only for it, and what it does.
COMMANDS = {
    "collect": ("CollectConfig", "keep a model's activations on text, or go on with a collection"),
    "train": ("TrainConfig", "train a sparse autoencoder on stored activations, or resume a training"),
    "evaluate": ("EvaluateConfig", "measure a training run on stored activations"),
    "report": ("ReportConfig", "show in one page what the latents of a training run stand for"),
}


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; the options of a command are the fields of its settings."""
    parser = argparse.ArgumentParser(prog="fastsparse", description="Sparse encoding for PyTorch.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(hint="")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (_, help) in COMMANDS.items():
        own = commands.add_parser(name, help=help, argument_default=argparse.SUPPRESS)
        own.set_defaults(do=partial(_run, name))
        if name == next(iter(arguments), None):
            _add_options(own, _settings(name))
            if name == "train":
                _add_model_options(own, arguments)
    info = commands.add_parser("info", help="report the environment, and which backends can run")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(do=_info)
    return parser


def _add_model_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Those of the model that is named, or of the one that is trained where none is."""
    from fastsparse.train.models import MODELS, options_of

    peek = argparse.ArgumentParser(prog=parser.prog, add_help=False)
    peek.add_argument("--model", default=_settings("train").model)
    model = peek.parse_known_args(arguments)[0].model
    if model in MODELS:  # otherwise the parser says which there are
        own = options_of(model)
        _add_options(parser.add_argument_group(f"options of the model {model}", own.__doc__), own)
        flags = ", ".join(_flag(about.name) for about in settings_of(own))
        parser.set_defaults(hint=f"; those of the model {model} are {flags}")


def _add_options(parser: argparse._ActionsContainer, settings: type) -> None:
    """One option for every field."""
    for about in settings_of(settings):
        kind, many, _ = parts(about.type)
        help = about.metadata["help"].replace("%", "%%")
        if about.default not in (MISSING, None, ()):
            help += f" (default: {about.default})"
        how: dict[str, Any] = {"help": help}
        how |= {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if many:
            how["nargs"] = "+"
        if about.metadata["choices"]:
            how["choices"] = about.metadata["choices"]
        if about.metadata["positional"]:
            parser.add_argument(about.name, **how)
        else:
            parser.add_argument(_flag(about.name), required=about.default is MISSING, **how)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _settings(command: str) -> type:
    return getattr(importlib.import_module(f"fastsparse.{command}"), COMMANDS[command][0])


def _run(command: str, options: argparse.Namespace) -> int:
    settings, given = _settings(command), vars(options)
    names = {about.name for about in settings_of(settings)}
    chosen = {name: value for name, value in given.items() if name in names}
    of_model = {name: value for name, value in given.items() if name not in {*names, "do", "hint"}}
    if of_model:
        chosen["options"] = of_model
    work = getattr(importlib.import_module(f"fastsparse.{command}"), command)
    print(work(settings(**chosen)).summary())
    return 0


def _info(options: argparse.Namespace) -> int:
    from fastsparse.info import environment, report

    described = environment()
    print(json.dumps(described, indent=2) if options.json else report(described))
    return 0


if __name__ == "__main__":
    sys.exit(main())
