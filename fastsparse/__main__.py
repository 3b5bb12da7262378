"""The command line: ``python -m fastsparse collect``, ``train``, ``report`` and ``info``."""

import argparse
import importlib
import io
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from functools import partial
from typing import get_args, get_origin

from fastsparse import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 1 (an error, explained), 2 (usage), 128 + signal."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path may hold letters that a terminal has not: they are no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        options = _parser(_command(arguments)).parse_args(arguments)
        return options.do(options)
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        print(f"fastsparse: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"fastsparse: {str(error) or 'interrupted; run the same command again'}", file=sys.stderr)
        return 128 + getattr(error, "signal_number", signal.SIGINT)


def _command(arguments: Sequence[str] | None) -> str | None:
    return next(iter(sys.argv[1:] if arguments is None else arguments), None)


# By command: its settings, which are imported only for it, and what it does.
COMMANDS = {
    "collect": ("CollectConfig", "keep a model's activations on text, or go on with a collection"),
    "train": ("TrainConfig", "train a sparse autoencoder on stored activations, or resume a training"),
    "report": ("ReportConfig", "show in one page what the latents of a training run stand for"),
}


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; the options of a command are the fields of its settings."""
    parser = argparse.ArgumentParser(prog="fastsparse", description="Sparse encoding for PyTorch.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (_, help) in COMMANDS.items():
        own = commands.add_parser(name, help=help)
        own.set_defaults(do=partial(_run, name))
        if name == command:
            _add_options(own, _settings(name))
    info = commands.add_parser("info", help="report the environment, and which backends can run")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(do=_info)
    return parser


def _add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """One option for every field."""
    for option in fields(settings):
        help = option.metadata["help"].replace("%", "%%")
        if option.metadata["positional"]:
            many = {"nargs": "+"} if get_origin(option.type) is Sequence else {}
            parser.add_argument(option.name, help=help, **many)
            continue
        flag = "--" + option.name.replace("_", "-")
        if option.type is bool:
            parser.add_argument(flag, action="store_true", help=help)
            continue
        kind = next((kind for kind in get_args(option.type) if kind is not type(None)), option.type)
        required = option.default is MISSING
        if not required and option.default is not None:
            help += f" (default: {option.default})"
        default = None if required else option.default
        parser.add_argument(flag, type=kind, required=required, default=default, help=help)


def _settings(command: str) -> type:
    return getattr(importlib.import_module(f"fastsparse.{command}"), COMMANDS[command][0])


def _run(command: str, options: argparse.Namespace) -> int:
    settings = _settings(command)
    chosen = settings(**{option.name: getattr(options, option.name) for option in fields(settings)})
    print(getattr(importlib.import_module(f"fastsparse.{command}"), command)(chosen).summary())
    return 0


def _info(options: argparse.Namespace) -> int:
    from fastsparse.info import environment, report

    described = environment()
    print(json.dumps(described, indent=2) if options.json else report(described))
    return 0


if __name__ == "__main__":
    sys.exit(main())
