"""The libraries' own tests without and with our ops under them: `make peers-test`.

    .venv-peers/bin/python tests/peers/run.py [library ...] [--checkouts folder]

A library's tests run against the release that is installed: once as it is, once after
``fastsparse.compat.<library>.apply(least_work=0)``. Every test must end as it did the first time, and some
call must have been served: else nothing was tried. Tests that need a network or a GPU end alike without one.

The tests are those of the release on PyPI. Where it holds none, those of ``--checkouts folder``: one checkout
a library by its name, of about that release: tests that don't fit it end alike too. What was found, test by
test, goes to build/peers/<library>/report.json.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "peers"
PINS = ("benchmarks/peers-requirements.txt", "benchmarks/peers-requirements-nodeps.txt")
SLOWER = 1.5  # times, for all of a library's tests: reported, as timings decide nothing
LIMIT = 3600  # seconds for a library's tests


class Suite(NamedTuple):
    """A release, which of its tests run, and whether they call what we replace so that we can serve it."""

    distribution: str
    tests: tuple[str, ...]
    are_served: bool = True


# By the name that a library is imported by, which is its adapter's.
SUITES = {
    "sae_lens": Suite("sae-lens", ("tests/saes", "tests/training/test_sae_trainer.py")),
    "sparsify": Suite("eai-sparsify", ("tests",)),
    "dictionary_learning": Suite("dictionary-learning", ("tests/unit",), are_served=False),  # none is sparse
    "overcomplete": Suite("overcomplete", ("tests/sae", "tests/misc/test_metrics.py")),
    "pararnn": Suite("pararnn-torch", ("tests/numerics", "tests/unit")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("libraries", nargs="*", choices=[[], *SUITES], help="default: all that we go under")
    parser.add_argument("--checkouts", type=Path, help="a folder of checkouts, where releases hold no tests")
    options = parser.parse_args()
    wrong = [
        library for library in options.libraries or _adapters() if not _is_alike(library, options.checkouts)
    ]
    if wrong:
        print(f"peers-test: not as without our ops: {', '.join(wrong)}", file=sys.stderr)
    return bool(wrong)


def _adapters() -> list[str]:
    found = (path.stem for path in (ROOT / "fastsparse" / "compat").glob("[!_]*.py"))
    return sorted(name for name in found if name in SUITES)


def _is_alike(library: str, checkouts: Path | None) -> bool:
    """Whether a library's tests end with our ops under it as they do without; prints what was seen."""
    suite, folder = SUITES[library], BUILD / library
    title = f"{library} {_pinned(suite.distribution)}"
    if library not in _adapters():
        print(f"{title}: WE HAVE NO ADAPTER for it: fastsparse/compat/{library}.py is not there")
        return False
    whose = _fetch_tests(library, suite, folder, checkouts)
    if whose is None:
        print(f"{title}: NO TESTS in its release: --checkouts takes others, else tests/compat stands for it")
        return True
    without, with_ours = (_run(library, suite, folder, apply) for apply in (False, True))
    before, after = without["tests"], with_ours["tests"]
    names = sorted(before.keys() | after.keys())
    ends = {name: [run.get(name, {}).get("outcome", "absent") for run in (before, after)] for name in names}
    differences = {name: pair for name, pair in ends.items() if pair[0] != pair[1]}
    seconds = [sum(test["seconds"] for test in run.values()) for run in (before, after)]
    calls = sum(with_ours["served"].values())

    print(
        f"{title}, tests of {whose}: without {_counts(before)}; with {_counts(after)}; {calls} calls served"
    )
    for name, (one, other) in differences.items():
        print(f"  DIFFERENT  {name}: {one} without, {other} with")
    for site, count in with_ours["served"].items():
        print(f"  {count:>6}  served   {site}")
    for site, why, count in with_ours["refused"]:
        print(f"  {count:>6}  refused  {site}: {why}")
    slower = ": SLOWER" if seconds[1] > SLOWER * seconds[0] else ""
    print(f"  {seconds[0]:.0f} s of processors without, {seconds[1]:.0f} s with{slower}")
    if not calls:
        known = ", as is known of them: tests/compat stands for it" if not suite.are_served else ""
        print(f"  NOTHING WAS SERVED: this proves nothing{known}")
    if not with_ours["applied"]:
        print("  OUR OPS WERE NOT UNDER IT AT THE END")
    report = {
        "release": title, "tests": whose, "differences": differences, "seconds": seconds,
        "without": without, "with": with_ours,
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return not differences and (bool(calls) or not suite.are_served) and with_ours["applied"]


def _counts(tests: dict[str, dict]) -> str:
    counts = Counter(test["outcome"] for test in tests.values())
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "no tests"


def _pinned(distribution: str) -> str:
    """The release that the peers' environment has."""
    for name in PINS:
        found = re.search(rf"^{distribution}==(\S+)$", (ROOT / name).read_text(), re.MULTILINE)
        if found:
            return found[1]
    raise KeyError(f"{distribution} stands in none of {', '.join(PINS)}")


def _fetch_tests(library: str, suite: Suite, folder: Path, checkouts: Path | None) -> str | None:
    """Put the tests into the folder, without what they test; returns whose they are, if any."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tarfile.open(_release(suite.distribution)) as tar:
        tar.extractall(folder / "sources", filter="data")
    (sources,) = (folder / "sources").iterdir()
    whose = "its release"
    if checkouts is not None and not (sources / "tests").exists():
        sources, whose = checkouts / library, "a checkout"
    if not (sources / "tests").exists():
        return None
    shutil.copytree(sources / "tests", folder / "tests")
    shutil.rmtree(folder / "sources")
    (folder / "pytest.ini").write_text("[pytest]\n")  # else it is ours that is found
    return whose


def _release(distribution: str) -> Path:
    """The archive of its sources."""
    version = _pinned(distribution)
    archive = BUILD / f"{distribution.replace('-', '_')}-{version}.tar.gz"
    if not archive.exists():
        download = (
            "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--no-binary", distribution,
            "--dest", str(BUILD), f"{distribution}=={version}",
        )  # fmt: skip
        subprocess.run((sys.executable, *download), check=True)
    return archive


def _run(library: str, suite: Suite, folder: Path, apply: bool) -> dict:
    """What tests/peers/watched.py wrote down of one run."""
    name = "with" if apply else "without"
    output = folder / f"{name}.json"
    tests = [path for path in suite.tests if (folder / path).exists()]
    environment = os.environ | {
        "FASTSPARSE_PEERS_LIBRARY": library, "FASTSPARSE_PEERS_APPLY": str(int(apply)),
        "FASTSPARSE_PEERS_OUTPUT": str(output),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "peers"))),
        # What isn't there fails at once, and in both runs.
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "disabled",
    }  # fmt: skip
    command = (
        sys.executable, "-m", "pytest", "-p", "watched", "-p", "no:cacheprovider", "-q", "--tb=short", "-rA",
        "--continue-on-collection-errors", *tests,
    )  # fmt: skip
    log = folder / f"{name}.log"
    with log.open("w") as written:
        subprocess.run(
            command, cwd=folder, env=environment, stdout=written, stderr=subprocess.STDOUT, timeout=LIMIT
        )
    if not output.exists():
        last = log.read_text().rstrip().rpartition("\n")[2]
        raise SystemExit(f"peers-test: {library}: its tests didn't run {name} our ops: {last} (in {log})")
    return json.loads(output.read_text())


if __name__ == "__main__":
    sys.exit(main())
