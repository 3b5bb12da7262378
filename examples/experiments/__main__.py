"""``python -m examples.experiments``: run experiments, and write their results and pictures."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PICTURES = HERE.parents[1] / "docs" / "experiments"
EXPERIMENTS = (
    "levels", "inference_k", "patches", "certificates", "state_tracking", "characters", "encoders", "atoms",
    "transcoders", "modalities", "superposition", "effective_features", "gated_scan", "winners",
    "interactions",
)  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.experiments", description="Compare encoders, and recurrences."
    )
    parser.add_argument(
        "names", nargs="*", metavar="experiment", help=f"which of {', '.join(EXPERIMENTS)} (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds, to try the machinery; writes nothing by default"
    )
    parser.add_argument("--redraw", action="store_true", help="only draw again what was written before")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for results and pictures (default: results/ here, docs/experiments/)",
    )
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(EXPERIMENTS))
    if unknown:
        parser.error(f"experiment must be among {', '.join(EXPERIMENTS)}, got {', '.join(unknown)}")
    if options.quick and options.redraw:
        parser.error("--redraw runs nothing: leave --quick out")
    return options


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    from benchmarks import results
    from benchmarks.provenance import provenance
    from examples.experiments import plots

    folder = chosen.output or (None if chosen.quick else HERE / "results")
    if folder is not None:
        plots.require_matplotlib()
    for name in chosen.names or EXPERIMENTS:
        experiment = importlib.import_module(f"examples.experiments.{name}")
        if not chosen.redraw:
            found: dict[str, Any] = {
                "experiment": name, "quick": chosen.quick, "provenance": provenance(),
                **experiment.run(quick=chosen.quick),
            }  # fmt: skip
            found = results.tidy(found, digits=4)
            print(f"{name}\n{experiment.table(found)}", flush=True)
            if folder is not None:
                results.write(folder / f"{name}.json", found)
        if folder is not None:
            found = results.read(folder / f"{name}.json")
            with plots.style(name) as pyplot:
                for stem, figure in experiment.draw(found, pyplot).items():
                    plots.save(figure, (chosen.output or PICTURES) / f"{stem}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
