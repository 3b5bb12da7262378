"""``python -m benchmarks``: measure, check, print, and write the results."""

import argparse
import importlib
import os
import sys
from pathlib import Path

from benchmarks.results import BENCHES


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure fastsparse beside what people use today."
    )
    parser.add_argument(
        "names", nargs="*", metavar="bench", help=f"which of {', '.join(BENCHES)} (default: all)"
    )
    parser.add_argument(
        "--peers", action="store_true", help="against other libraries instead of torch.compile"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, to try the machinery; writes nothing by default"
    )
    parser.add_argument("--output", type=Path, help="folder for the results (default: benchmarks/results)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        help="time for the rounds of one case; headline cases get twice that (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, help="threads of every contender (default: torch's own choice)"
    )
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(BENCHES))
    if unknown:
        parser.error(f"bench must be among {', '.join(BENCHES)}, got {', '.join(unknown)}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if not options.seconds > 0:
        parser.error(f"--seconds must be above 0, got {options.seconds}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """0 if every answer was right. Whether the bars stand is for the reader: timings fail nothing."""
    chosen = parse(arguments)
    if chosen.threads is not None:  # before any library sets up its pool
        os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(chosen.threads)
    import torch

    from benchmarks import bars, ceilings, plots, provenance, results
    from benchmarks.cases import Options, lines, wrong

    folder = chosen.output or (None if chosen.quick else results.RESULTS)
    if folder is not None:
        plots.require_matplotlib()
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    options = Options(peers=chosen.peers, quick=chosen.quick, seconds=chosen.seconds)
    origin = provenance.provenance()
    print("\n".join(f"{key}: {value}" for key, value in origin.items()), flush=True)
    all_bars, faults = [], []
    for name in chosen.names or BENCHES:
        cases, own_bars = [], []
        for case, found in importlib.import_module(f"benchmarks.bench_{name}").run(options):
            cases.append(case)
            own_bars += found
            faults += wrong(case)
            backend = f" (backend {case['backend']})" if "backend" in case else ""
            print(f"\n{name}: {case['name']}{backend}\n{lines(case)}", flush=True)
        all_bars += own_bars
        if folder is not None and cases:
            stem = f"{name}-peers" if chosen.peers else name
            target = folder / origin["machine"] / f"{stem}.json"
            result = {
                "bench": name, "peers": chosen.peers, "quick": chosen.quick, "provenance": origin,
                "copy_bandwidth": ceilings.copy_bandwidth(),
                "cases": cases, "bars": [bar.record() for bar in own_bars],
            }  # fmt: skip
            results.write(target, results.tidy(result))
            plots.draw(results.read(target), target.with_suffix(".svg"))
    print(f"\nbars\n{bars.table(all_bars)}")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
