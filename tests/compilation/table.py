"""The committed table: docs/compilation.json, and docs/compilation.md which is made of it."""

import json
from collections.abc import Iterator
from dataclasses import replace

from .tools import ROOT, TRITON_VERSIONS
from .usage import SHARED_LIMITS, Usage

DATA = ROOT / "docs" / "compilation.json"
PAGE = ROOT / "docs" / "compilation.md"

FIELDS = ("registers", "shared", "spilled", "key", "matrix")  # of a kernel on a GPU; some end before
# What is known to be spilled, in bytes a thread, by one of the Tritons: two to four registers, not mended.
# Nothing else may spill, nor these more.
KNOWN_TO_SPILL = {
    ("topk_encode: refine, fp32", "sm_100"): 8,
    ("topk_encode: collect, fp32, options, num_warps = 8", "sm_100"): 8,
    ("topk_encode: collect, fp32, options, num_warps = 8", "sm_120"): 8,
    ("topk_encode: select, fp32, options, num_warps = 4", "sm_90"): 8,
    ("matching_pursuit: product, gram, D = 768", "sm_120"): 16,
}
# What multiplies 16-bit matrices by mma.sync where a GPU has better: 16 tokens, where wgmma and tcgen05.mma
# take 64 rows. Such a product is bound by reading the weight, 16 operations a byte, for which mma.sync is
# fast enough; 48 rows of nothing would only make every tile's epilogue longer.
KNOWN_BY_MMA_SYNC = {
    ("topk_encode: score, bf16, few tokens", "sm_90"),
    ("topk_encode: score, bf16, few tokens", "sm_100"),
}
SAMPLE = 32  # of so many of the newest Triton's kernels one is compiled whether or not anything has changed

HEAD = f"""# What the GPU kernels need of a GPU

Made by `python -m tests.compilation --write`, without a GPU. A cell holds the registers of a thread (VGPRs
on AMD's GPUs) and the shared memory of a block in KB; of CUDA C++ kernels that is what they declare, a
launch may add to it. Triton's kernels are those that calls of the ops launch (`tests/compilation/calls.py`),
specialised as these launches are (`:16`: a multiple of 16). `make test` fails where a kernel spills, but for
{len(KNOWN_TO_SPILL)} that are known to spill 8 or 16 bytes a thread and are shown so, where one doesn't
compile, where one wants more shared memory than the GPU has, and where one multiplies 16-bit matrices by
another instruction than the GPU's fastest, but for {len(KNOWN_BY_MMA_SYNC)} that are known to; a cell says
which. It compiles those of Triton's kernels of which something has changed since, as a hash of all that goes
into a compilation tells, and one in {SAMPLE} of the others.
"""


def usage_of(record: dict) -> Usage:
    return Usage(record["registers"], record["shared"], record["spilled"], record.get("matrix", ""))


def complaints(records: list[dict]) -> Iterator[str]:
    """What is wrong with kernels, one line or more each."""
    for record in records:
        where = f"{record['name']} for {record['target']}"
        if "error" in record:
            yield f"{where}: {record['error']}"
        else:
            usage, which = usage_of(record), (record["name"], record["target"])
            if usage.spilled <= KNOWN_TO_SPILL.get(which, 0):
                usage = replace(usage, spilled=0)
            if usage.matrix == "mma.sync" and which in KNOWN_BY_MMA_SYNC:
                usage = replace(usage, matrix="")
            yield from (f"{where}: {complaint}" for complaint in usage.complaints(record["target"]))


def write(sections: dict[str, list[dict]]) -> None:
    """Write the sections given, a line for each kernel; a section that isn't given keeps what it says."""
    data = read() | sections
    texts = []
    for title, records in sorted(data.items()):
        kernels: dict[str, dict] = {}
        for record in records:
            usage = [record[name] for name in FIELDS if record.get(name, "") != ""]
            kernels.setdefault(record["name"], {})[record["target"]] = usage
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(usage)}" for name, usage in kernels.items())
        texts.append(f" {json.dumps(title)}: {{\n{lines}\n }}")
    DATA.write_text("{{\n{}\n}}\n".format(",\n".join(texts)), encoding="utf-8")
    PAGE.write_text(page(read()), encoding="utf-8")


def read() -> dict[str, list[dict]]:
    """The records of every section."""
    data = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
    return {
        title: [
            {"name": name, "target": target} | dict(zip(FIELDS, usage, strict=False))
            for name, targets in kernels.items()
            for target, usage in targets.items()
        ]
        for title, kernels in data.items()
    }


def known(title: str) -> list[dict]:
    """The records of a section that need no compiling again, if their keys are still the same."""
    return [record for record in read().get(title, []) if not sampled(title, record)]


def sampled(title: str, record: dict) -> bool:
    return title == f"Triton {TRITON_VERSIONS[-1]}" and int(record["key"], 16) % SAMPLE == 0


def page(data: dict[str, list[dict]]) -> str:
    """The data as Markdown."""
    parts = [HEAD]
    for title, records in sorted(data.items()):
        present = {record["target"] for record in records}
        targets = [target for target in SHARED_LIMITS if target in present]
        cells = {(record["name"], record["target"]): _cell(usage_of(record)) for record in records}
        lines = [f"| {title} |", "|---|"]
        lines[0] += "".join(f" {target} |" for target in targets)
        lines[1] += "---|" * len(targets)
        for name in dict.fromkeys(record["name"] for record in records):
            row = "".join(f" {cells.get((name, target), '')} |" for target in targets)
            lines.append(f"| `{name}` |{row}")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _cell(usage: Usage) -> str:
    parts = [str(usage.registers), *([f"{usage.shared / 1024:.3g} KB"] if usage.shared else [])]
    parts += [f"{usage.spilled} B spilled"] if usage.spilled else []
    return ", ".join([*parts, *([usage.matrix] if usage.matrix else [])])
