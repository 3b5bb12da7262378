"""``python -m benchmarks.gpu``: measure everything on one GPU within a time that is kept, and write it down.

The measuring is done by ``benchmarks.gpu.worker``. What is left when the time is up, hangs, or brings the
process down is named as left out, with the reason.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import bars, results
from benchmarks.bars import Bar
from benchmarks.cases import OURS, lines, quantity, wrong
from benchmarks.gpu import choice, worker
from benchmarks.results import GPU_BENCHES

ROOT = Path(__file__).parents[2]
MINUTES = 7.5
PATIENCE = 120.0  # seconds that one case may take, compiling included
RESERVE = 15.0  # seconds kept for ending a case and writing
REHEARSED = {"measured": None, "passed": False, "note": "a rehearsal measures nothing"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Measure fastsparse on a GPU."
    )
    parser.add_argument(
        "names", nargs="*", metavar="bench", help=f"which of {', '.join(GPU_BENCHES)} (default: all)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--choice", action="store_true", help="only compare our own two backends, over more shapes"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU at tiny shapes, to try the machinery"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.4,
        help="time for the rounds of one case; headline cases get twice that (default: %(default)s)",
    )
    parser.add_argument(
        "--until",
        type=float,
        help=f"when all must have ended, in seconds since 1970 (default: in {MINUTES} minutes)",
    )
    parser.add_argument(
        "--package", type=Path, default=Path.cwd(), help="folder that fastsparse is imported from"
    )
    parser.add_argument("--commit", help="for the provenance, where the checkout can't tell")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(GPU_BENCHES))
    if unknown:
        parser.error(f"bench must be among {', '.join(GPU_BENCHES)}, got {', '.join(unknown)}")
    if options.choice and options.names:
        parser.error("--choice measures a grid of its own: name no bench beside it")
    if not options.seconds > 0:
        parser.error(f"--seconds must be above 0, got {options.seconds}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """0 if every answer was right and every case was run. Whether the bars stand is for the reader."""
    chosen = parse(arguments)
    until = time.time() + 60 * MINUTES if chosen.until is None else chosen.until
    benches = ("choice",) if chosen.choice else tuple(chosen.names) or GPU_BENCHES
    chosen.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "cases.jsonl"
        with (chosen.output / "gpu-bench.log").open("w") as noise:
            ended = run(log, benches, chosen, until, noise)
        found = list(worker.lines(log))
    if not any("plan" in line for line in found):
        said = (chosen.output / "gpu-bench.log").read_text().strip().splitlines() or ["no output"]
        print(f"gpu-bench: nothing could be measured: {ended}: {said[-1]}", file=sys.stderr)
        return 2
    files = collect(found, ended, benches, quick=chosen.rehearse, commit=chosen.commit)
    for result in files:
        results.write(chosen.output / f"{result['bench']}.json", results.tidy(result))
    text = "\n\n".join(
        f"{result['bench']}: {case['name']}\n{lines(case)}" for result in files for case in result["cases"]
    )
    (chosen.output / "table.txt").write_text(f"{text}\n\n{summary(files)}\n")
    print(summary(files))
    faults = [fault for result in files for case in result["cases"] for fault in wrong(case)]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults or any(result["left_out"] for result in files) else 0


def run(log: Path, benches: Sequence[str], chosen: argparse.Namespace, until: float, noise: Any) -> str:
    """Keep a worker going until all is measured or the time is up; returns why the last one ended."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    command = [sys.executable, "-m", "benchmarks.gpu.worker", str(log), *benches]
    command += ["--seconds", str(chosen.seconds), "--until", str(until - RESERVE)]
    command += ["--rehearse"] if chosen.rehearse else []
    begun = 0
    while True:
        process = subprocess.Popen(
            command, cwd=chosen.package, env={**os.environ, "PYTHONPATH": path},
            stdout=noise, stderr=subprocess.STDOUT,
        )  # fmt: skip
        why = watch(process, log, until)
        before, begun = begun, sum("begun" in line for line in worker.lines(log))
        if process.returncode == 0 or time.time() > until - RESERVE or begun == before:
            return why


def watch(process: subprocess.Popen, log: Path, until: float) -> str:
    """Wait for a worker, or end it; returns how it ended."""
    started = time.monotonic()
    while process.poll() is None:
        last = started
        for line in worker.lines(log):
            last = max(last, line.get("begun", 0.0))
        late = time.time() > until
        if late or time.monotonic() - last > PATIENCE:
            process.kill()
            process.wait()
            return "the time was up" if late else f"killed after {PATIENCE:.0f} s without an end"
        time.sleep(0.2)
    return f"its process ended with status {process.returncode}"


def collect(
    found: list[dict[str, Any]], ended: str, benches: Sequence[str], *, quick: bool, commit: str | None
) -> list[dict[str, Any]]:
    """The result files, in the format of :mod:`benchmarks.results`."""
    head = next(line for line in found if "ceilings" in line)
    plan = next(line["plan"] for line in found if "plan" in line)
    origin = head["provenance"]
    origin["commit"] = origin["commit"] or commit
    done = {(line["bench"], line["job"]): line for line in found if "case" in line or "left_out" in line}
    files = []
    for bench in benches:
        result = {
            "bench": bench, "peers": False, "quick": quick, "provenance": origin,
            "ceilings": head["ceilings"], "cases": [], "bars": [], "left_out": [],
        }  # fmt: skip
        for planned in (one for one in plan if one["bench"] == bench):
            line = done.get((bench, planned["job"]), {})
            if "case" in line:
                result["cases"].append(line["case"] | {"took": line["took"]})
                result["bars"] += line["bars"]
                continue
            reason = line.get("left_out", ended)
            result["left_out"].append({"name": planned["job"], "reason": reason})
            result["bars"] += [bar | {"note": reason} for bar in planned["bars"]]
        if quick:
            result["bars"] = [bar | REHEARSED for bar in result["bars"]]
        files.append(result)
    return files


def summary(files: list[dict[str, Any]]) -> str:
    """A line a case, what was left out, the ceilings, the choice of backends, and the bars."""
    out = ["a rehearsal: these figures mean nothing"] if files[0]["quick"] else []
    out += [f"{name}: {value:.4g}/s" for name, value in files[0]["ceilings"].items()]
    for result in files:
        for case in result["cases"]:
            out.append(f"{result['bench']:13} {_line(case)}")
        out += [
            f"{result['bench']:13} left out: {one['name']}: {one['reason']}" for one in result["left_out"]
        ]
    promised = [Bar(**{k: v for k, v in bar.items() if k != "passed"}) for r in files for bar in r["bars"]]
    return "\n".join([*out, choice.table(files), bars.table(promised)])


def _line(case: dict[str, Any]) -> str:
    ours = case["contenders"].get(OURS, {})
    if "median" not in ours:
        return f"{case['name']}: {ours.get('failure', 'nothing')}"
    ratios = case["ratios"].get(OURS, {})
    parts = [f"{ratio['of_medians']:.2f}x {other}" for other, ratio in ratios.items()]
    share = f"{ours['roofline']['share']:4.0%} of floor" if "roofline" in ours else ""
    return f"{quantity(ours['median'], 's'):>8} {share:14} {case['name']}: {', '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())
