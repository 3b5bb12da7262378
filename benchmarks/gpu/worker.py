"""``python -m benchmarks.gpu.worker``: measure jobs and write a line of JSON on each as soon as it is done.

A process of its own: after a fault on the device nothing more can be run in it, and a kernel that hangs can't
be stopped from within. ``benchmarks.gpu`` starts it, watches it, and starts another for what is left.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import GPU_BENCHES, tidy

LOST_DEVICE = 3  # exit status: a fault on the device, start another process


def jobs_of(lab: Any, ceilings: dict[str, float], benches: Sequence[str]) -> list:
    """Every job, the most important first."""
    modules = [importlib.import_module(f"benchmarks.gpu.bench_{name}") for name in benches]
    return sorted(
        (job for module in modules for job in module.jobs(lab, ceilings)), key=lambda job: job.priority
    )


def lines(log: Path) -> Iterator[dict[str, Any]]:
    """What a worker wrote; the last line of one that was killed may be cut."""
    if not log.exists():
        return
    for line in log.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def work(log: Path, benches: Sequence[str], *, rehearsal: bool, seconds: float, until: float) -> int:
    """Measure what ``log`` doesn't hold yet; returns an exit status."""
    import torch

    from benchmarks import provenance
    from benchmarks.gpu import ceilings
    from benchmarks.gpu.lab import Lab

    torch.set_float32_matmul_precision("highest")
    past = list(lines(log))
    with log.open("a") as file:

        def say(**record: Any) -> None:
            file.write(json.dumps(tidy(record), ensure_ascii=False) + "\n")
            file.flush()

        lab = Lab.open(rehearsal=rehearsal, seconds=seconds, until=until)
        measured = next((line["ceilings"] for line in past if "ceilings" in line), None)
        if measured is None:
            measured = ceilings.measure(lab)
            origin = provenance.provenance() if rehearsal else provenance.gpu_provenance()
            say(ceilings=measured, provenance=origin)
        jobs = jobs_of(lab, measured, benches)
        if not past:
            say(plan=[_planned(job) for job in jobs])
        begun = {(line["bench"], line["job"]) for line in past if "job" in line}
        for job in jobs:
            if (job.bench, job.name) in begun:
                continue
            if time.monotonic() > until:
                say(bench=job.bench, job=job.name, left_out="the time was up")
                continue
            say(bench=job.bench, job=job.name, begun=time.monotonic())
            start = time.monotonic()
            try:
                case = job.run()
                bars = [bar.record() for bar in job.bars(case)]
                took = time.monotonic() - start
                say(bench=job.bench, job=job.name, case=case, bars=bars, took=took)
            except Exception as error:  # one case must not cost the others
                say(bench=job.bench, job=job.name, left_out=f"{type(error).__name__}: {error}"[:2000])
            if lab.device.type == "cuda" and not _alive(torch):
                return LOST_DEVICE
    return 0


def _planned(job: Any) -> dict[str, Any]:
    """A job as it is reported where nothing more is heard of it."""
    bars = [bar.record() for bar in job.bars(job.nothing("not run"))]
    return {"bench": job.bench, "job": job.name, "bars": bars}


def _alive(torch: Any) -> bool:
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure on a GPU; started by python -m benchmarks.gpu.")
    parser.add_argument("log", type=Path)
    parser.add_argument("benches", nargs="+", choices=[*GPU_BENCHES, "choice"])
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--until", type=float, required=True, help="by time.time()")
    arguments = parser.parse_args()
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels then run on CPU tensors
    until = time.monotonic() + arguments.until - time.time()
    return work(
        arguments.log, arguments.benches,
        rehearsal=arguments.rehearse, seconds=arguments.seconds, until=until,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
