"""Measure jobs, and write a line of JSON on each as soon as it is done.

On a GPU in a process of its own, ``python -m benchmarks.worker LOG OPTIONS``, these in JSON: after a fault on
the device nothing more can be run in it, and a kernel that hangs can't be stopped from within. ``benchmarks``
starts it, watches it, and starts another for what is left.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.results import BENCHES, tidy

LOST_DEVICE = 3  # exit status: a fault on the device, start another process


def jobs_of(lab: Any, benches: Sequence[str]) -> list:
    """Every job that is important enough, the most important first."""
    modules = dict.fromkeys(BENCHES[bench] for bench in benches)
    every = (job for name in modules for job in importlib.import_module(f"benchmarks.{name}").jobs(lab))
    wanted = (job for job in every if job.bench in benches and job.given.priority <= lab.priority)
    return sorted(wanted, key=lambda job: job.given.priority)


def lines(log: Path) -> Iterator[dict[str, Any]]:
    """What a worker wrote; the last line of one that was killed may be cut."""
    if not log.exists():
        return
    for line in log.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def work(log: Path, benches: Sequence[str], *, device: str, **options: Any) -> int:
    """Measure what ``log`` doesn't hold yet; returns an exit status. The options are attributes of a lab."""
    import torch

    from benchmarks import cases, provenance
    from benchmarks.lab import Lab

    torch.set_float32_matmul_precision("highest")
    past = list(lines(log))
    with log.open("a") as file:

        def say(**record: Any) -> None:
            file.write(json.dumps(tidy(record), ensure_ascii=False) + "\n")
            file.flush()

        known = next((line["ceilings"] for line in past if "ceilings" in line), None)
        lab = Lab.open(device, known=known, **options)
        if known is None:
            origin = provenance.provenance if lab.device.type == "cpu" else provenance.gpu_provenance
            say(ceilings=lab.ceilings, provenance=origin())
        jobs = jobs_of(lab, benches)
        if not past:
            unheard = ((job, _records(job, job.nothing("not run"))) for job in jobs)
            say(plan=[{"bench": job.bench, "job": job.name, "bars": bars} for job, bars in unheard])
        begun = {(line["bench"], line["job"]) for line in past if "job" in line}
        for job in jobs:
            if (job.bench, job.name) in begun:
                continue
            say_of = partial(say, bench=job.bench, job=job.name)
            start = time.monotonic()
            if start > lab.until:
                say_of(left_out="the time was up")
                continue
            say_of(begun=start)
            try:
                case = job.case(lab)
                say_of(case=case, bars=_records(job, case), took=time.monotonic() - start)
                print(f"\n{job.bench}: {job.name}\n{cases.lines(case)}", flush=True)
            except Exception as error:  # one case must not cost the others
                say_of(left_out=f"{type(error).__name__}: {error}"[:2000])
            if lab.device.type == "cuda" and not _alive(torch):
                return LOST_DEVICE
    return 0


def _records(job: Any, case: dict[str, Any]) -> list[dict[str, Any]]:
    return [bar.record() for bar in job.bars(case)]


def _alive(torch: Any) -> bool:
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main() -> int:
    log, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    if options["quick"]:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels then run on CPU tensors
    options["until"] += time.monotonic() - time.time()
    return work(log, options.pop("benches"), device="cuda", **options)


if __name__ == "__main__":
    sys.exit(main())
