"""``make gpu-test``: every test that a GPU makes possible, and compute-sanitizer, within a time that is kept.

Each part is a process of its own, because a fault on the device ends all that a process can still do; several
run at once, because compiling takes longer than testing. What is left when the time is up is named. Standard
library alone, so that it can say what is wrong where nothing can be imported.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
MINUTES = 7.5
JOBS = 8
FAULT = 99  # compute-sanitizer's exit status where it found something
# Files of tests/ by the backends that they run on: both, or CUDA C++ alone. Those of tests/kernels/ take
# Triton's by themselves.
OPS = (
    "topk_encode", "spmm", "sddmm", "spmm_t", "sparse_decode", "composition", "linear_recurrence",
    "gated_recurrences", "newton_recurrence", "matching_pursuit", "matching_pursuit_step",
    "matching_pursuit_backward_gpu", "validation", "backends", "registration", "fpu_modes", "fuzz",
)  # fmt: skip
IN_CUDA = ("topk_encode_cuda", "linear_recurrence_cuda", "gated_recurrences_cuda", "matching_pursuit_cuda")
OWN = (
    "here", "graphs", "streams", "memory", "large", "reproducible", "errors", "machinery", "training",
)  # fmt: skip
TOOLS = ("memcheck", "racecheck", "synccheck")
REFUSED = re.compile(
    r"Device not supported|No attachable process|not supported on this|Unable to launch", re.I
)
OUTCOME = re.compile(r"^(\S*::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?: \((.*)\))?(?: +\[ *\d+%\])?$")
BLAME = re.compile(r"^(?:FAILED|ERROR) (\S*?(?:\.py|::.*?))(?: - (.*))?$")


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: what the table calls it.
        command: what to run.
        limit: seconds that it may take.
        kind: ``pytest``, ``sanitizer``, or ``planted``: a sanitizer that must find something.
        environment: what it needs beside the present one.
    """

    name: str
    command: tuple[str, ...]
    limit: float = 400.0
    kind: str = "pytest"
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        verdict: ``passed``, ``failed`` or ``left out``.
        reason: why, in a line.
        counts: tests by outcome.
        faults: what failed, each with its message.
        skips: reasons, each with how many tests.
    """

    name: str
    verdict: str
    reason: str = ""
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    skips: dict[str, int] = field(default_factory=dict)


def parts(python: str) -> list[Part]:
    """All of them, the most important first."""

    def pytest(name: str, *arguments: str) -> Part:
        quiet = [f"-Wdefault::{warning}Warning" for warning in ("Deprecation", "Future", "User")]
        command = [
            python,
            "-m",
            "pytest",
            "--config-file",
            str(ROOT / "pyproject.toml"),
            "--rootdir",
            str(ROOT),
        ]
        return Part(name, (*command, "-vv", "--tb=short", *quiet, *arguments))

    tests = ROOT / "tests"
    found = [pytest("gpu/here", str(tests / "gpu/test_here.py"))]
    found += [
        pytest(f"{op}, {backend}", str(tests / f"test_{op}.py"), "-k", f"{backend}-gpu")
        for op in OPS
        for backend in ("cuda", "triton")
    ]
    found += [pytest(name, str(tests / f"test_{name}.py"), "-k", "cuda-gpu") for name in IN_CUDA]
    of_kernels = sorted((tests / "kernels").glob("test_*.py"))
    found += [pytest(f"kernels/{path.stem.removeprefix('test_')}", str(path)) for path in of_kernels]
    found += sanitizers(python)
    found += [pytest(f"gpu/{name}", str(tests / f"gpu/test_{name}.py")) for name in OWN[1:]]
    others = [*map(str, sorted(tests.glob("test_*.py"))), str(tests / "nn")]
    return [*found, pytest("marked gpu elsewhere", *others, "-m", "gpu")]


def sanitizers(python: str) -> list[Part]:
    script = str(ROOT / "tests/gpu/sanitized.py")
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    )
    # A caching allocator would hide what lies between two tensors.
    bare = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ("--error-exitcode", str(FAULT), "--report-api-errors", "no")
    ours = ("--kernel-name", "kernel_substring=fastsparse")

    def part(name: str, which: str, *arguments: str, kind: str = "sanitizer") -> Part:
        command = (tool or "compute-sanitizer", "--tool", which, *options, *ours, python, script, *arguments)
        return Part(name, command, kind=kind, environment=bare)

    return [
        part("sanitizer, planted fault", "memcheck", "--planted", kind="planted"),
        *(part(f"sanitizer, {which}", which) for which in TOOLS),
    ]


def run(todo: list[Part], *, cwd: Path, logs: Path, until: float, jobs: int = JOBS) -> list[Outcome]:
    """Run the parts, several at once, in order; those that the time doesn't suffice for are left out."""
    waiting, running, done = list(todo), {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs and time.time() < until:
                part = waiting.pop(0)
                log = logs / f"{todo.index(part):02}.log"
                started = _start(part, cwd, log)
                if isinstance(started, str):
                    done[part.name] = Outcome(part.name, "left out", started)
                else:
                    running[part.name] = (part, started, log, time.time())
            for name, (part, process, log, start) in list(running.items()):
                took = time.time() - start
                ended = process.poll()
                if ended is None and took < part.limit and time.time() < until:
                    continue
                if ended is None:
                    _end(process)
                done[name] = judge(part, ended, log.read_text(errors="replace"), took)
                del running[name]
            if time.time() >= until:
                done |= {part.name: Outcome(part.name, "left out", "the time was up") for part in waiting}
                waiting = []
            time.sleep(0.1)
    finally:
        for _, process, _, _ in running.values():
            _end(process)
    return [done[part.name] for part in todo]


def _start(part: Part, cwd: Path, log: Path) -> subprocess.Popen | str:
    """The process of a part, or why it can't be started."""
    path = os.pathsep.join(filter(None, (str(cwd.resolve()), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "300", **part.environment}
    with log.open("w") as file:
        try:
            return subprocess.Popen(
                part.command, cwd=cwd, env=environment,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return f"{Path(part.command[0]).name} can't be run: {error.strerror}"


def _end(process: subprocess.Popen) -> None:
    """End a process and those that it started: its session is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def judge(part: Part, status: int | None, log: str, seconds: float) -> Outcome:
    """What a part's exit status (None: it was ended) and its output say."""
    lines = log.splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    out = Outcome(part.name, "failed", seconds=round(seconds, 1))
    if part.kind != "pytest":
        refused = next((line.strip("= ") for line in lines if REFUSED.search(line)), None)
        found = sum("Invalid" in line or "Race reported" in line for line in lines)
        if status is None:
            out.reason = f"ended after {seconds:.0f} s without an end"
        elif refused is not None:
            out.verdict, out.reason = "left out", f"compute-sanitizer doesn't work here: {refused}"
        elif part.kind == "planted":
            out.verdict = "passed" if status == FAULT and found else "failed"
            out.reason = "found" if out.verdict == "passed" else f"a planted fault was not reported: {last}"
        else:
            out.verdict, out.reason = ("passed" if status == 0 else "failed"), last.strip("= ")
            out.faults = (
                [] if status == 0 else [line.strip("= ") for line in lines if line.startswith("=")][:20]
            )
        return out
    outcomes = [match for line in lines if (match := OUTCOME.match(line))]
    out.counts = dict(Counter(match[2].lower() for match in outcomes))
    out.skips = dict(Counter(match[3] or "no reason" for match in outcomes if match[2] == "SKIPPED"))
    blamed = [match for line in lines if (match := BLAME.match(line))]
    out.faults = [f"{match[1]}: {match[2] or ''}" for match in blamed]
    if status is None:
        out.reason = f"ended after {seconds:.0f} s; the last line: {last}"
    elif status == 0 and out.counts.get("passed"):
        out.verdict = "passed"
    elif status == 0:
        out.verdict, out.reason = "left out", f"nothing ran: {'; '.join(out.skips) or 'no tests'}"
    else:
        out.reason = {5: "no test was found"}.get(status, last)
    return out


def table(outcomes: list[Outcome]) -> str:
    """A line a part, the failed last with what failed."""
    lines = []
    for out in sorted(outcomes, key=lambda out: ("passed", "left out", "failed").index(out.verdict)):
        counts = ", ".join(f"{number} {what}" for what, number in out.counts.items())
        said = "; ".join(filter(None, (counts, out.reason)))
        lines.append(f"{out.verdict:8} {out.seconds:6.1f} s  {out.name}: {said}")
        lines += [f"    {fault[:300]}" for fault in out.faults[:5]]
        lines += [f"    and {len(out.faults) - 5} more"] if len(out.faults) > 5 else []
    verdicts = Counter(out.verdict for out in outcomes)
    tests = sum((Counter(out.counts) for out in outcomes), Counter())
    lines.append(f"{len(outcomes)} parts: {_listed(verdicts)}; tests: {_listed(tests)}")
    return "\n".join(lines)


def _listed(counter: Counter) -> str:
    return ", ".join(f"{number} {what}" for what, number in sorted(counter.items())) or "none"


def provenance(python: str, cwd: Path, commit: str | None) -> dict[str, object]:
    """The environment as fastsparse describes it, or why it can't."""
    code = "import json, fastsparse.info; print(json.dumps(fastsparse.info.environment()))"
    done = subprocess.run([python, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    described = json.loads(done.stdout) if done.returncode == 0 else {"failure": done.stderr[-2000:]}
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return {"date": date, "commit": commit, **described}


def main(arguments: list[str] | None = None) -> int:
    """0 if everything ran and passed."""
    parser = argparse.ArgumentParser(description="Test fastsparse on a GPU.")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for gpu-test.json and gpu-test.log"
    )
    parser.add_argument("--package", type=Path, default=ROOT, help="folder that fastsparse is imported from")
    parser.add_argument(
        "--until",
        type=float,
        help=f"when all must have ended, in seconds since 1970 (default: in {MINUTES} minutes)",
    )
    parser.add_argument("--commit", help="what is tested, where the checkout can't tell")
    parser.add_argument("-k", dest="only", default="", help="only parts whose name holds this")
    chosen = parser.parse_args(arguments)
    until = time.time() + 60 * MINUTES if chosen.until is None else chosen.until
    todo = [part for part in parts(sys.executable) if chosen.only in part.name]
    if not todo:
        names = ", ".join(part.name for part in parts(sys.executable))
        parser.error(f"-k must be in the name of a part ({names}), got {chosen.only!r}")
    chosen.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        logs = Path(scratch)
        outcomes = run(todo, cwd=chosen.package, logs=logs, until=until - 5)
        texts = [f"##### {part.name}\n{_read(logs / f'{place:02}.log')}" for place, part in enumerate(todo)]
    (chosen.output / "gpu-test.log").write_text("\n".join(texts))
    result = {
        "format": 1,
        "provenance": provenance(sys.executable, chosen.package, chosen.commit),
        "parts": [asdict(out) for out in outcomes],
    }
    (chosen.output / "gpu-test.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(table(outcomes))
    return 0 if all(out.verdict == "passed" for out in outcomes) else 1


def _read(log: Path, most: int = 400_000) -> str:
    """A log, its middle cut out where it is long."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return text if len(text) <= most else f"{text[: most // 2]}\n[...]\n{text[-most // 2 :]}"


if __name__ == "__main__":
    sys.exit(main())
