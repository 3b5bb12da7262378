"""``python -m benchmarks``: measure, check, print, and write the results.

On a GPU the measuring is done by ``benchmarks.worker`` within a time that is kept: what is left when the time
is up, hangs, or brings the process down is named as left out, with the reason.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import worker
from benchmarks.results import BENCHES, RESULTS, tidy, write

ROOT = Path(__file__).parents[1]
SECONDS = {"cpu": 2.0, "cuda": 0.4}
MINUTES = 7.5  # on a GPU
PATIENCE = 120.0  # seconds that one case may take there, compiling included
RESERVE = 15.0  # seconds kept for ending a case and writing
PASSED = ("choice", "compiler", "trace", "quick", "seconds", "priority")  # to a worker on a GPU
TRIED = {"measured": None, "passed": False, "note": "a trial measures nothing"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    description = "Measure fastsparse beside what people use today."
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=description)
    option, benches, folder = parser.add_argument, ", ".join(BENCHES), Path.cwd()
    option("names", nargs="*", metavar="bench", help=f"which of {benches} (default: all)")
    option("--device", choices=SECONDS, default="cpu", help="what is measured (default: cpu)")
    option("--peers", action="store_true", help="on a CPU: other libraries instead of torch.compile")
    option("--choice", action="store_true", help="on a GPU: our own two backends alone")
    option("--no-compile", dest="compiler", action="store_false", help="without torch.compile")
    trace = (
        "on a GPU: also our kernels, their replay as CUDA graphs, and topk_encode by the sizes of its blocks"
    )
    option("--trace", action="store_true", help=trace)
    option("--priority", type=int, default=99, help="the least important cases to measure (0: the most)")
    quick = "tiny shapes on the CPU, to try the machinery, also a GPU's; writes nothing by default"
    option("--quick", action="store_true", help=quick)
    option("--output", type=Path, help="folder for the results (default: benchmarks/results)")
    seconds = (
        "for a case's rounds, of which there is a least number; a headline case gets twice that "
        f"(default: {SECONDS['cpu']} on a CPU, {SECONDS['cuda']} on a GPU; nothing where --quick)"
    )
    option("--seconds", type=float, help=seconds)
    option("--threads", type=int, help="of every contender (default: torch's own choice)")
    until = f"when a GPU's run must end, since 1970 (default: in {MINUTES} minutes)"
    option("--until", type=float, help=until)
    option("--package", type=Path, default=folder, help="folder that a GPU's run imports fastsparse from")
    option("--commit", help="for the provenance, where the checkout can't tell")
    chosen = parser.parse_args(arguments)
    unknown = sorted(set(chosen.names) - set(BENCHES))
    if unknown:
        parser.error(f"bench must be among {benches}, got {', '.join(unknown)}")
    if chosen.threads is not None and chosen.threads < 1:
        parser.error(f"--threads must be at least 1, got {chosen.threads}")
    if chosen.seconds is not None and not chosen.seconds > 0:
        parser.error(f"--seconds must be above 0, got {chosen.seconds}")
    if chosen.choice and chosen.device == "cpu":
        parser.error("--choice compares backends for GPUs: it needs --device cuda")
    if chosen.trace and chosen.device == "cpu":
        parser.error("--trace looks at what a GPU does: it needs --device cuda")
    if chosen.peers and chosen.device == "cuda":
        parser.error("--peers are for a CPU: on a GPU all others are measured in one run")
    chosen.names = chosen.names or list(BENCHES)
    chosen.seconds = chosen.seconds or SECONDS[chosen.device]
    chosen.output = chosen.output or (None if chosen.quick else RESULTS)
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """0 if every answer was right and every case was run. Whether the bars stand is for the reader."""
    chosen = parse(arguments)
    if chosen.threads is not None:  # before any library sets up its pool
        os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(chosen.threads)
    measured = _on_a_gpu if chosen.device == "cuda" else _on_the_cpu
    files: list[dict[str, Any]] = []
    try:
        for result in measured(chosen):
            files.append(result)
            if chosen.output is not None:
                stem = result["bench"] + ("-peers" * result["peers"] or "-choice" * chosen.choice)
                write(chosen.output / result["provenance"]["machine"] / f"{stem}.json", tidy(result))
    except NothingError as error:
        print(f"benchmarks: nothing could be measured: {error}", file=sys.stderr)
        return 2
    from benchmarks import cases, choice

    text = "\n".join([summary(files), *([choice.table(files)] if chosen.device == "cuda" else [])])
    print(f"\n{text}")
    if chosen.output not in (None, RESULTS):
        of_cases = (f"{r['bench']}: {c['name']}\n{cases.lines(c)}" for r in files for c in r["cases"])
        (chosen.output / "table.txt").write_text("\n\n".join([*of_cases, text]) + "\n")
    faults = [fault for result in files for case in result["cases"] for fault in cases.wrong(case)]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults or any(result["left_out"] for result in files) else 0


class NothingError(Exception):
    """Not even a plan was made; why."""


def _on_the_cpu(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Bench by bench, so that what is done is written if a run is broken off."""
    import torch

    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    options = {name: vars(chosen)[name] for name in ("peers", "compiler", "quick", "seconds", "priority")}
    for bench in chosen.names:
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch) / "cases.jsonl"
            worker.work(log, [bench], device="cpu", until=math.inf, **options)
            yield from collect(list(worker.lines(log)), "", [bench], chosen)


def _on_a_gpu(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The most important cases first, whichever bench's they are."""
    until = time.time() + 60 * MINUTES if chosen.until is None else chosen.until
    with tempfile.TemporaryDirectory() as scratch:
        log, out = Path(scratch) / "cases.jsonl", chosen.output or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        with (out / "gpu-bench.log").open("w") as noise:
            ended = run(log, chosen, until, noise)
        found = list(worker.lines(log))
        if not any("plan" in line for line in found):
            said = (out / "gpu-bench.log").read_text().strip().splitlines() or ["no output"]
            raise NothingError(f"{ended}: {said[-1]}")
    yield from collect(found, ended, chosen.names, chosen)


def run(log: Path, chosen: argparse.Namespace, until: float, noise: Any) -> str:
    """Keep a worker going until all is measured or the time is up; returns why the last one ended."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    options = {"benches": chosen.names, "until": until - RESERVE}
    options |= {name: vars(chosen)[name] for name in PASSED}
    command = [sys.executable, "-m", "benchmarks.worker", str(log), json.dumps(options)]
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
        last = max(started, *(line.get("begun", 0.0) for line in worker.lines(log)), 0.0)
        late = time.time() > until
        if late or time.monotonic() - last > PATIENCE:
            process.kill()
            process.wait()
            return "the time was up" if late else f"killed after {PATIENCE:.0f} s without an end"
        time.sleep(0.2)
    return f"its process ended with status {process.returncode}"


def collect(
    found: list[dict[str, Any]], ended: str, benches: Sequence[str], chosen: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The result files of the benches that have any case here, in the format of :mod:`benchmarks.results`."""
    head = next(line for line in found if "ceilings" in line)
    plan = next(line["plan"] for line in found if "plan" in line)
    origin = head["provenance"]
    origin["commit"] = origin["commit"] or chosen.commit
    done = {(line["bench"], line["job"]): line for line in found if "case" in line or "left_out" in line}
    for bench in benches:
        result = {
            "bench": bench, "peers": chosen.peers, "quick": chosen.quick, "provenance": origin,
            "ceilings": head["ceilings"], "cases": [], "bars": [], "left_out": [],
        }  # fmt: skip
        mine = [one for one in plan if one["bench"] == bench]
        for planned in mine:
            line = done.get((bench, planned["job"]), {})
            if "case" in line:
                result["cases"].append(line["case"] | {"took": line["took"]})
                result["bars"] += line["bars"]
                continue
            reason = line.get("left_out", ended)
            result["left_out"].append({"name": planned["job"], "reason": reason})
            result["bars"] += [bar | {"note": reason} for bar in planned["bars"]]
        if chosen.quick and chosen.device == "cuda":
            result["bars"] = [bar | TRIED for bar in result["bars"]]
        if mine:
            yield result


def summary(files: list[dict[str, Any]]) -> str:
    """The ceilings, a line a case, what was left out, and the bars."""
    from benchmarks import bars

    if not files:
        return "none of these benches has a case here"
    out = ["a trial: these figures mean nothing"] if files[0]["quick"] else []
    origin = files[0]["provenance"].items()
    out += [f"{key}: {value}" for key, value in (*origin, *files[0]["ceilings"].items())]
    for result in files:
        out += [f"{result['bench']:13} {_line(case)}" for case in result["cases"]]
        left_out = ((one["name"], one["reason"]) for one in result["left_out"])
        out += [f"{result['bench']:13} left out: {name}: {reason}" for name, reason in left_out]
    promised = (bars.Bar(**{k: v for k, v in b.items() if k != "passed"}) for r in files for b in r["bars"])
    return "\n".join([*out, "", "bars", bars.table(promised)])


def _line(case: dict[str, Any]) -> str:
    from benchmarks.cases import OURS, quantity

    ours = case["contenders"].get(OURS, {})
    if "median" not in ours:
        return f"{case['name']}: {ours.get('failure', case.get('skipped', 'no figure of ours alone'))}"
    parts = [f"{ratio['of_medians']:.2f}x {other}" for other, ratio in case["ratios"].get(OURS, {}).items()]
    shares = [share for key, share in ours.get("roofline", {}).items() if key.startswith("share")]
    share = f"{max(shares):4.0%} of floor" if shares else ""
    return f"{quantity(ours['median'], ours['unit']):>8} {share:14} {case['name']}: {', '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())
