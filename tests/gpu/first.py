"""``make gpu-first``: what to know first of a new GPU, within a time that is kept, in an archive and a table.

What was built and what is here; every op alone, on either backend, so that a fault costs no other op
anything; how exact the tensor cores are; what matters most, measured and taken apart; and in the rest of the
time the tests. With ``--quick`` a trial on CPU tensors. Standard library alone, as suite.py.
"""

import argparse
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from gpu import suite
from gpu.suite import GRACE, ROOT, TESTS, Outcome, Part, judge_script, read, run, table

HERE = TESTS / "gpu"
CHECK = HERE / "checked.py"
BACKENDS = ("cuda", "triton")
OPS = tuple(sorted(path.stem for path in (ROOT / "kernels").glob("[!_]*.py")))  # a module each
BENCHES = (
    "topk_encode", "sparse_decode", "spmm_t", "sddmm", "matching_pursuit", "sae_step", "linear_recurrence",
    "gru_recurrence", "lstm_recurrence",
)  # fmt: skip
PRIORITY = 2
MINUTES = 9.0
# Seconds that each may take: for tests what is left.
BUILD, CHECKING, AGAIN, PROBING, MEASURING = 250, 110, 60, 50, 190
SOON = 85  # after which a check begins no case
TESTED_WITH = "pytest xdist hypothesis"
SHOWN = ("what is here", "tensor cores", "benchmarks")  # whose output is in the table
MOST = 6000  # characters of it


def stages(
    chosen: argparse.Namespace, scratch: Path, until: float, outcomes: list[Outcome]
) -> Iterator[list[Part]]:
    """What runs at once, one after the other; given what became of those before."""

    def script(name: str, limit: float, file: Path | str, words: str, *more: object) -> Part:
        command = (sys.executable, str(file), *words.split(), *map(str, more))
        return Part(name, command, judge=judge_script, limit=limit)

    device = "--device cpu" if chosen.quick else ""
    if not chosen.quick:
        make = "make", "-C", str(ROOT), "gpu-kernels", f"PYTHON={sys.executable}", f"NEEDS={TESTED_WITH}"
        yield [Part("build", make, judge=judge_script, limit=BUILD)]
        if not (chosen.package / "fastsparse").exists():
            return  # nothing can be built or run here
    yield [script("what is here", PROBING, "-m", "fastsparse info")]
    alone = f"--seconds {SOON} {device} --op"
    checks = [
        replace(
            script(f"{op}, {name}", CHECKING, CHECK, f"{alone} {op} --backend {name}"),
            environment={"OMP_NUM_THREADS": "1"},  # of so many at once
        )
        for op in OPS
        for name in BACKENDS
    ]
    yield checks
    failed = {out.name for out in outcomes if out.verdict == "failed"}
    again = next((part for part in checks if part.name in failed), None)
    if again is not None:  # so that the launch that fails is the one at fault
        blocking = again.environment | {"CUDA_LAUNCH_BLOCKING": "1"}
        yield [replace(again, name=f"{again.name}, again", environment=blocking, limit=AGAIN)]
    yield [script("tensor cores", PROBING, HERE / "tensor_cores.py", device)]
    end = min(until - GRACE, time.time() + MEASURING)  # it still has to write then
    words = f"benchmarks --device cuda --no-compile --trace --priority {PRIORITY} --until {end}"
    words += " --quick" * chosen.quick
    more = "--package", chosen.package.resolve(), "--output", scratch / "benchmarks"
    more += ("--commit", chosen.commit) if chosen.commit else ()
    yield [script("benchmarks", MEASURING + GRACE, "-m", words, *BENCHES, *more)]
    tests = suite.tests(sys.executable, scratch, HERE, "training" if chosen.quick else "")
    yield [replace(tests, environment=tests.environment | {"REHEARSE_GPU_TESTS": str(int(chosen.quick))})]


def keep(output: Path, scratch: Path, outcomes: list[Outcome], commit: str | None) -> str:
    """Write down all that there is by now, and return the table."""
    parts = {"commit": commit, "parts": [asdict(out) for out in outcomes]}
    (scratch / "gpu-first.json").write_text(json.dumps(parts, indent=1, ensure_ascii=False) + "\n")
    logs = [scratch / f"{name}.log" for name in SHOWN]
    shown = [f"##### {log.stem}\n{read(log, MOST)}" for log in logs if log.exists()]
    text = "\n".join([*shown, table(outcomes)])
    (output / "gpu-first.txt").write_text(text + "\n")
    for log in scratch.rglob("*.log"):
        log.write_text(read(log))  # its middle cut out where it is long
    with tarfile.open(output / "gpu-first.tar.gz", "w:gz") as archive:
        archive.add(scratch, "gpu-first")
    return text


def main(arguments: list[str] | None = None) -> int:
    """0 if everything ran and passed."""
    parser = argparse.ArgumentParser(description="Try fastsparse on a new GPU.")
    option = parser.add_argument
    option("--output", type=Path, required=True, help="folder for gpu-first.txt and gpu-first.tar.gz")
    option("--package", type=Path, default=ROOT, help="folder that fastsparse is built in and imported from")
    option("--until", type=float, help=f"when all ends, since 1970 (default: in {MINUTES} minutes)")
    option("--commit", help="what is tried, where the checkout can't tell")
    option("--quick", action="store_true", help="a trial on CPU tensors of what is built")
    chosen = parser.parse_args(arguments)
    until = (time.time() + 60 * MINUTES if chosen.until is None else chosen.until) - GRACE - 5
    for folder in (chosen.output, chosen.package):
        folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    text = ""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        one = partial(run, cwd=chosen.package, scratch=scratch, until=until)
        for parts in stages(chosen, scratch, until, outcomes):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                outcomes += pool.map(one, parts)
            text = keep(chosen.output, scratch, outcomes, chosen.commit)
    print(text)
    return 0 if all(out.verdict == "passed" for out in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
