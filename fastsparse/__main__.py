"""The command line: ``python -m fastsparse train`` and ``python -m fastsparse info``."""

import argparse
import io
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import get_args

from fastsparse import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 1 (an error, explained), 2 (usage), 128 + signal."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path may hold letters that a terminal has not: they are no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        options = _parser(_command(arguments)).parse_args(arguments)
        return options.run(options)
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        print(f"fastsparse: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"fastsparse: {str(error) or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(error, "signal_number", signal.SIGINT)


def _command(arguments: Sequence[str] | None) -> str | None:
    return next(iter(sys.argv[1:] if arguments is None else arguments), None)


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; the options of ``train`` are the trainer's, which is imported only for them."""
    parser = argparse.ArgumentParser(prog="fastsparse", description="Sparse encoding for PyTorch.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    train = commands.add_parser(
        "train", help="train a sparse autoencoder on stored activations, or resume a training"
    )
    train.set_defaults(run=_train)
    if command == "train":
        _add_config(train)
    info = commands.add_parser("info", help="report the environment, and which backends can run")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    """One option for every field of the configuration; the data are positional."""
    from fastsparse.train import TrainConfig

    for option in fields(TrainConfig):
        help = option.metadata["help"].replace("%", "%%")
        if option.name == "data":
            parser.add_argument("data", nargs="+", help=help)
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


def _train(options: argparse.Namespace) -> int:
    from fastsparse.train import TrainConfig, train

    chosen = {option.name: getattr(options, option.name) for option in fields(TrainConfig)}
    result = train(TrainConfig(**chosen))
    if result.metrics is None:
        print("all steps had been done before")
    else:
        m = result.metrics
        print(f"step {m.step}: loss {m.loss:.4f}, FVU {m.fvu:.4f}, L0 {m.l0:.1f}, {m.dead} dead latents")
    print(f"checkpoint: {result.checkpoint}\nlog: {result.log}")
    return 0


def _info(options: argparse.Namespace) -> int:
    from fastsparse.info import environment, report

    described = environment()
    print(json.dumps(described, indent=2) if options.json else report(described))
    return 0


if __name__ == "__main__":
    sys.exit(main())
