"""``python -m benchmarks.report``: the tables of README.md and of docs, from the committed results.

``--check`` writes nothing and fails if the tables are not what the results say.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.cases import ANOTHER_MODEL, COPY, OURS, quantity
from benchmarks.results import BENCHES, RESULTS, read, replace

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
PART = "\\*"  # marks a figure that was scaled
MODEL = "†"  # marks what another model took
NOTES = {  # by what a table holds
    PART: f"{PART} That library was timed on part of the tokens; its time is scaled to all of them.",
    MODEL: f"{MODEL} Another model, of as many inputs and channels, which its recurrence mixes.",
    f"| {COPY} |": f"{COPY} is a copy through memory of as many bytes as the op reads and writes.",
}
ROOT = Path(__file__).parents[1]
# What the README shows of every kind of machine: a file of results, a case in it, and the other contender.
HEADLINES = {
    "`topk_encode` against PyTorch": ("topk_encode-peers", "wide, gaussian", "torch"),
    "`topk_encode` against FAISS": ("topk_encode-peers", "wide, gaussian", "faiss"),
    **{
        f"a training step against {peer}": ("sae_step-peers", "SAE step", peer)
        for peer in ("SAELens", "dictionary_learning", "sparsify")
    },
    **{
        f"{case} with the line against without": ("drop_in-peers", case, "as it is")
        for case in ("SAELens TopK", "dictionary_learning TopK", "sparsify")
    },
}
NO_GPU = (
    "**No GPU has been measured yet.** The kernels for GPUs have run in an emulator and an interpreter, "
    "never on a GPU: no figure is claimed for them. `make gpu-bench` measures."
)


def render(results: Path) -> str:
    """The Markdown of every machine under ``results``.

    Raises:
        ValueError: there are no results, or a file is not a result or is a quick trial's.
    """
    folders = _machines(results)
    sections = [machine(folder) for folder in folders]
    if not any(folder.name.startswith("gpu-") for folder in folders):
        sections.append(NO_GPU)
    if not folders:
        raise ValueError(
            f"report: {results.name} must hold <machine>/<bench>.json, found none: run `make bench`"
        )
    return "\n\n".join(sections)


def _machines(results: Path) -> list[Path]:
    return [folder for folder in sorted(results.glob("?pu-*")) if any(folder.glob("*.json"))]


def kinds(results: Path) -> str:
    """The Markdown of a few figures side by side: how many times as fast we are, on each kind of machine."""
    folders = [folder for folder in _machines(results) if any(folder.glob("*-peers.json"))]
    lines = [["how many times as fast", *map(kind, folders)], ["---"] + ["---:"] * len(folders)]
    for what, (stem, name, other) in HEADLINES.items():
        lines.append([what, *(_ratio(folder / f"{stem}.json", name, other) for folder in folders)])
    return _table(lines)


def drop_in(results: Path) -> str:
    """The Markdown of steps under other libraries, with our ops and without, on each kind of machine."""
    files = {folder: folder / "drop_in-peers.json" for folder in _machines(results)}
    cases = {
        folder: {case["name"]: case for case in read(path)["cases"]}
        for folder, path in files.items()
        if path.exists()
    }
    lines = [["step"], ["---"]]
    for folder in cases:
        lines[0] += [f"{kind(folder)}: as it is", "with the line", "with `relayout=True`, too"]
        lines[1] += ["---:"] * 3
    for name in next(iter(cases.values()), {}):
        found = [_step(of_folder.get(name)) for of_folder in cases.values()]
        lines.append([name, *(cell for cells in found for cell in cells)])
    return _table(lines)


def _step(case: dict[str, Any] | None) -> list[str]:
    """As it is, with our ops, and with weights laid out anew: seconds, and how many times as fast."""
    medians = {} if case is None else {who: it.get("median") for who, it in case["contenders"].items()}
    slow, *fast = (medians.get(who) for who in ("as it is", OURS, f"{OURS}, relayout_"))
    if slow is None:
        return [""] * 3
    shown = [f"{quantity(median, 's')}, {slow / median:.1f}x" if median else "" for median in fast]
    return [quantity(slow, "s"), *shown]


def _ratio(path: Path, name: str, other: str) -> str:
    """Of a case; empty where it wasn't measured."""
    cases = read(path)["cases"] if path.exists() else []
    ratios = next((case["ratios"].get(OURS, {}) for case in cases if case["name"] == name), {})
    return f"{ratios[other]['of_medians']:.1f}x" if other in ratios else ""


def _table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kind(folder: Path) -> str:
    """A folder's name for people.

    Example:
        >>> kind(Path("cpu-amd-zen5-avx512-2core"))
        'AMD Zen 5, AVX-512, 2 cores'
    """
    device, *parts = folder.name.split("-")
    if device != "cpu":
        return " ".join(parts)
    words = " ".join(parts).replace("amd", "AMD").replace("intel", "Intel").replace("avx512", ", AVX-512,")
    words = re.sub(r"\bavx2\b", ", AVX2,", words)
    words = re.sub(r"\bzen(\d)", r"Zen \1", words)
    return re.sub(r"(\d+)core", r"\1 cores", words).replace(" ,", ",")


def machine(folder: Path) -> str:
    """A machine's heading, tables, runs and bars."""
    files = {path: read(path) for path in sorted(folder.glob("*.json"))}
    for path, result in files.items():
        if result["quick"]:
            raise ValueError(f"report: {path.name} is a quick trial: its figures mean nothing")
    origin = max((result["provenance"] for result in files.values()), key=lambda origin: origin["date"])
    heading = (
        f"### {kind(folder)}\n\n"
        f"Measured on {_device(origin)}, torch {origin['torch']}. "
        f"Medians; columns say how many times as fast as that library we are (memory: how many times less)."
    )
    runs = [f"{path.stem} ({_measured(result['provenance'])})" for path, result in files.items()]
    parts = [heading, *tables(list(files.values()))]
    parts += [note for mark, note in NOTES.items() if any(mark in part for part in parts)]
    parts.append(f"All cases, from `benchmarks/results/{folder.name}`: {', '.join(runs)}.")
    parts.append(verdict(list(files.values())))
    return "\n\n".join(parts)


def _measured(origin: dict[str, Any]) -> str:
    return f"{origin['date']}, commit {origin['commit']}{' with changes' if origin['modified'] else ''}"


def _device(origin: dict[str, Any]) -> str:
    if "gpu" not in origin:
        cores = f"{origin['cores']} cores, {origin['instruction_set']}, {origin['threads']} threads"
        return f"{origin['cpu']}, {cores}"
    versions = f"CUDA {origin['cuda']}, Triton {origin['versions'].get('triton', 'not there')}"
    return f"{origin['gpu']} ({origin['gpu_memory_gib']} GiB), {versions}"


def tables(files: list[dict[str, Any]]) -> list[str]:
    """The headline cases, a table for each bench; a peers' file adds columns, and rows of its own."""
    files = sorted(files, key=lambda result: result["peers"])
    every = (table(bench, [one for one in files if one["bench"] == bench]) for bench in BENCHES)
    return [text for text in every if text is not None]


def table(bench: str, files: list[dict[str, Any]]) -> str | None:
    """A bench's headline cases, a row each; None if there are none."""
    rows: dict[str, dict[str, Any]] = {}
    columns: list[str] = []
    for result in files:
        for case in result["cases"]:
            ours = case["contenders"].get(OURS, {})
            if not case["headline"] or "median" not in ours:
                continue
            row = rows.setdefault(case["name"], {"case": case, "ours": ours, "ratios": {}})
            for other, ratio in case["ratios"].get(OURS, {}).items():
                record = case["contenders"].get(other, {})
                mark = PART if "share" in record else MODEL if record.get("check") == ANOTHER_MODEL else ""
                row["ratios"].setdefault(other, f"{ratio['of_medians']:.2f}x{mark}")
                columns += [] if other in columns else [other]
    if not rows:
        return None
    lines = [[bench, "shape", OURS, *columns], ["---"] * 2 + ["---:"] * (1 + len(columns))]
    for name, row in rows.items():
        shape = " ".join(f"{key}={value}" for key, value in row["case"]["shape"].items())
        cells = [row["ratios"].get(other, "") for other in columns]
        lines.append([name, shape, quantity(row["ours"]["median"], row["ours"]["unit"]), *cells])
    return _table(lines)


def verdict(files: list[dict[str, Any]]) -> str:
    """How many bars stand, and each that doesn't."""
    bars = [bar for result in files for bar in result["bars"]]
    failed = [bar for bar in bars if not bar["passed"]]
    lines = [f"{len(bars) - len(failed)} of {len(bars)} required figures stand{':' if failed else '.'}"]
    for bar in failed:
        got = "not measured" if bar["measured"] is None else f"{bar['measured']:.3g} {bar['unit']}"
        note = f" ({bar['note']})" if bar["note"] else ""
        lines.append(
            f"- missed: {bar['name']}: {bar['relation']} {bar['required']:g} {bar['unit']}, got {got}{note}"
        )
    if failed:
        lines[0] = lines[0].replace("stand:", "stand; these don't:") + "\n"
    return "\n".join(lines)


def fill(text: str, block: str) -> str:
    """``text`` with ``block`` between the two markers.

    Raises:
        ValueError: not exactly one of each marker, in order.

    Example:
        >>> fill(f"a {BEGIN} old {END} z", "new") == f"a {BEGIN}\\nnew\\n{END} z"
        True
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"report: the page must hold {BEGIN} and after it {END}, once each")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{block}\n{text[text.index(END) :]}"


FILLED = {"docs/benchmarks.md": render, "README.md": kinds, "docs/drop-in.md": drop_in}


def main(arguments: list[str] | None = None) -> int:
    description = f"Fill {', '.join(FILLED)} from the results."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=description)
    parser.add_argument("--check", action="store_true", help="fail if they are stale; write nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the files to fill")
    chosen = parser.parse_args(arguments)
    try:
        before = {page: (chosen.root / page).read_text() for page in FILLED}
        after = {page: fill(text, FILLED[page](chosen.results)) for page, text in before.items()}
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    stale = [page for page in FILLED if after[page] != before[page]]
    for page in stale:
        if chosen.check:
            print(f"{page} is stale: run `python -m benchmarks.report`", file=sys.stderr)
        else:
            replace(chosen.root / page, after[page].encode())
    return int(chosen.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
