"""``make gpu-test``: every test that a GPU makes possible, and compute-sanitizer, within a time that is kept.

The tests are pytest's, on several workers at once, because compiling takes longer than testing. What is left
when the time is up is named. Standard library alone, so that it can say what is wrong where nothing can be
imported.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
LARGE = "gpu/test_large.py"
MINUTES = 7.5
WORKERS = 8
LONGEST = 240  # seconds that one test may take
GRACE = 20.0  # seconds in which pytest writes down what it has done when the time is up
FAULT = 99  # compute-sanitizer's exit status where it found something
FOUND = "wrong: "  # how a script's lines begin that say what is wrong
TOOLS = ("memcheck", "racecheck", "synccheck")
REFUSED = re.compile(
    r"Device not supported|No attachable process|not supported on this|Unable to launch", re.I
)


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        judge: says what became of it, given its name, exit status, output and the folder of reports.
        limit: seconds that it may take.
    """

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    judge: Callable[..., "Outcome"] = field(default_factory=lambda: judge_tests)
    limit: float = math.inf


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        verdict: ``passed``, ``failed`` or ``left out``.
        reason: why, in a line.
        counts: tests by outcome.
        faults: what failed, each with its message.
        skips: reasons, each with how many tests.
        left: tests that weren't run, by file.
    """

    name: str
    verdict: str
    reason: str = ""
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    skips: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)


def tests(python: str, scratch: Path, folder: Path, only: str) -> Part:
    """The tests whose names, files or marks say that they are for a GPU; those of kernels/ take one too."""
    chosen = f"(gpu or kernels) and ({only})" if only else "gpu or kernels"
    elsewhere = ["benchmarks", "compilation", "demo", "examples", "train"]
    elsewhere += ["gpu/test_first.py", "gpu/test_suite.py", *([] if only else [LARGE])]
    return _pytest("tests", python, scratch, folder, chosen, elsewhere, WORKERS)


def large_tests(python: str, scratch: Path) -> Part:
    """Those that take a good part of the GPU's memory, for which they must have it alone."""
    return _pytest("large tests", python, scratch, TESTS / LARGE, "gpu", [], 1)


def _pytest(
    name: str, python: str, scratch: Path, path: Path, chosen: str, elsewhere: list[str], workers: int
) -> Part:
    options = [f"--ignore={TESTS / path}" for path in elsewhere]
    options += [f"-Wdefault::{warning}Warning" for warning in ("Deprecation", "Future", "User")]
    options += [f"--override-ini=faulthandler_timeout={LONGEST}", "--tb=short", f"-n{workers}"]
    options += ["--override-ini=faulthandler_exit_on_timeout=true", "--max-worker-restart=100"]
    # Each worker begins with its own stretch of the tests. (By file or class, a crash would be repeated.)
    options += ["--dist=worksteal"]
    options += [f"--config-file={ROOT / 'pyproject.toml'}", f"--rootdir={ROOT}", "-pgpu.fatal"]
    command = (
        python,
        "-m",
        "pytest",
        str(path),
        "-k",
        chosen,
        f"--junit-xml={scratch / name}.xml",
        *options,
    )
    environment = {"FASTSPARSE_COLLECTED": str(scratch / f"{name}.json"), "COLUMNS": "300"}
    environment["FASTSPARSE_CUDA"] = "1"  # a backend that doesn't load is no pass
    return Part(name, command, environment)


def sanitizers(python: str) -> list[Part]:
    script = str(TESTS / "gpu/checked.py")
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    )
    # A caching allocator would hide what lies between two tensors.
    bare = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ("--error-exitcode", str(FAULT), "--report-api-errors", "no")
    ours = ("--kernel-name", "kernel_substring=fastsparse", python, script)

    def part(name: str, which: str, *arguments: str) -> Part:
        command = (tool or "compute-sanitizer", "--tool", which, *options, *ours, *arguments)
        return Part(f"sanitizer, {name}", command, bare, judge_sanitizer)

    return [part("planted", "memcheck", "--planted"), *(part(which, which) for which in TOOLS)]


def run(part: Part, *, cwd: Path, scratch: Path, until: float) -> Outcome:
    """Run a part, which must have ended by ``until``; its output is kept under its name."""
    start, log = time.time(), scratch / f"{part.name}.log"
    if start >= until:
        return Outcome(part.name, "failed", "the time was up")
    until = min(until, start + part.limit)
    paths = str(cwd.resolve()), str(TESTS), str(ROOT), os.environ.get("PYTHONPATH")
    environment = {**os.environ, **part.environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                part.command, cwd=cwd, env=environment,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Outcome(
                part.name, "left out", f"{Path(part.command[0]).name} can't be run: {error.strerror}"
            )
    status = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        status = process.wait(max(0.0, until - time.time()))
    if status is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):  # and those that it started: its session is its own
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    out = part.judge(part.name, status, log.read_text(errors="replace"), scratch)
    out.seconds = round(time.time() - start, 1)
    return out


def judge_tests(name: str, status: int | None, log: str, scratch: Path) -> Outcome:
    """What pytest's report says, and its exit status (None: it was ended)."""
    out = Outcome(name, "failed")
    found, collected = scratch / f"{name}.xml", scratch / f"{name}.json"
    cases = list(ElementTree.parse(found).iter("testcase")) if found.exists() else []
    cases = [case for case in cases if case.get("name")]  # one that was only set up has none
    left = (
        {_as_in_xml(test): test for test in json.loads(collected.read_text())} if collected.exists() else {}
    )
    counts, skips = Counter(), Counter()
    for case in cases:
        where = case.get("classname"), case.get("name")
        left.pop(where, None)
        verdict = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        kind = {"failure": "failed", "skipped": "skipped"}.get(getattr(verdict, "tag", "passed"), "passed")
        kind = "error" if verdict is not None and verdict.tag == "error" else kind
        counts[kind] += 1
        said = (verdict.get("message") or "no reason").splitlines()[0] if verdict is not None else ""
        if kind == "skipped":
            skips[said] += 1
        elif verdict is not None:
            out.faults.append(f"{'::'.join(filter(None, where))}: {said}")
    out.counts, out.skips = dict(counts), dict(skips)
    out.left = dict(Counter(test.partition("::")[0] for test in left.values()))
    if status is None:
        out.reason = "the time was up"
    elif not counts["passed"] and not out.faults:
        out.verdict, out.reason = "left out", f"nothing ran: {'; '.join(out.skips) or _last(log)}"
    elif status == 0 and not out.left:
        out.verdict = "passed"
    else:
        out.reason = _last(log)
    return out


def _as_in_xml(test: str) -> tuple[str, str]:
    path, _, name = test.partition("::")
    return path.removesuffix(".py").replace("/", "."), name


def judge_sanitizer(name: str, status: int | None, log: str, scratch: Path) -> Outcome:
    """What a sanitizer's exit status (None: it was ended) and its output say."""
    lines = log.splitlines()
    refused = next((line.strip("= ") for line in lines if REFUSED.search(line)), None)
    found = sum("Invalid" in line or "Race reported" in line for line in lines)
    if status is None:
        return Outcome(name, "failed", "the time was up")
    if refused is not None:
        return Outcome(name, "left out", f"compute-sanitizer doesn't work here: {refused}")
    if name.endswith("planted"):
        if status == FAULT and found:
            return Outcome(name, "passed", "found")
        return Outcome(name, "failed", f"a planted fault was not reported: {_last(log)}")
    faults = [] if status == 0 else [line.strip("= ") for line in lines if line.startswith("=")][:20]
    return Outcome(name, "failed" if status else "passed", _last(log).strip("= "), faults=faults)


def judge_script(name: str, status: int | None, log: str, scratch: Path) -> Outcome:
    """What a script's exit status says (None: it was ended), its output's last line, and faults in it."""
    if status is None:  # what it was at
        log = log.partition("Traceback (most recent call last)")[0]
    ended = "the time was up" if status is None else signal.Signals(-status).name if status < 0 else ""
    faults = [line.strip() for line in log.splitlines() if line.startswith(FOUND)]
    reason = "; ".join(filter(None, (ended, _last(log))))
    return Outcome(name, "failed" if status != 0 else "passed", reason, faults=faults)


def _last(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "no output")


def table(outcomes: list[Outcome]) -> str:
    """A line a part, the failed last with what failed."""
    lines = []
    for out in sorted(outcomes, key=lambda out: ("passed", "left out", "failed").index(out.verdict)):
        said = "; ".join(filter(None, (_listed(out.counts), out.reason)))
        lines.append(f"{out.verdict:8} {out.seconds:6.1f} s  {out.name}: {said}")
        lines += [f"    {fault[:300]}" for fault in out.faults[:20]]
        lines += [f"    and {len(out.faults) - 20} more"] if len(out.faults) > 20 else []
        lines += [f"    not run: {number} of {file}" for file, number in out.left.items()]
    return "\n".join([*lines, f"{len(outcomes)} parts: {_listed(Counter(out.verdict for out in outcomes))}"])


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))


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
    parser.add_argument(
        "-k", dest="only", default="", help="only these tests, as of pytest, and no sanitizer"
    )
    chosen = parser.parse_args(arguments)
    until = time.time() + 60 * MINUTES if chosen.until is None else chosen.until
    chosen.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        lines = [[tests(sys.executable, scratch, TESTS, chosen.only)]]
        if not chosen.only:
            lines[0].append(large_tests(sys.executable, scratch))
            lines += [[part] for part in sanitizers(sys.executable)]
        options = {"cwd": chosen.package, "scratch": scratch, "until": until - GRACE - 5}
        # Lines run side by side, a line's parts one after another.
        with ThreadPoolExecutor(len(lines)) as pool:
            outcomes = list(chain(*pool.map(lambda line: [run(part, **options) for part in line], lines)))
        texts = [f"##### {log.stem}\n{read(log)}" for log in sorted(scratch.glob("*.log"))]
        (chosen.output / "gpu-test.log").write_text("\n".join(texts))
    described = provenance(sys.executable, chosen.package, chosen.commit)
    result = {"format": 1, "provenance": described, "parts": [asdict(out) for out in outcomes]}
    (chosen.output / "gpu-test.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(table(outcomes))
    return 0 if all(out.verdict == "passed" for out in outcomes) else 1


def read(log: Path, most: int = 400_000) -> str:
    """A log, its middle cut out where it is long."""
    text = log.read_text(errors="replace")
    return text if len(text) <= most else f"{text[: most // 2]}\n[...]\n{text[-most // 2 :]}"


if __name__ == "__main__":
    sys.exit(main())
