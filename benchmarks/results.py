"""Result files: written whole or not at all, and readable by the report."""

import contextlib
import json
import math
import os
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FORMAT = 1
FAMILIES = {  # the result files of a module that has several
    "sparse_products": ("sparse_decode", "sddmm", "spmm_t"),
    "gated_recurrence": ("gru_recurrence", "lstm_recurrence"),
    "polynomials": ("poly_norm", "poly_relu"),
}
FIRST = (
    "topk_encode", "sparse_products", "matching_pursuit", "sae_step", "linear_recurrence", "gated_recurrence",
)  # fmt: skip
ABSOLUTE_PATH = re.compile(r"(?<![\w.])/(?:[\w.+@-]+/)+[\w.+@-]*")


def benches(folder: Path) -> dict[str, str]:
    """Result files in the order of the tables, and the module of each: every ``bench_<name>.py`` has one."""
    names = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    last = [name for name in names if name not in FIRST]
    ordered = [name for name in (*FIRST, *last) if name in names]
    return {bench: f"bench_{name}" for name in ordered for bench in FAMILIES.get(name, (name,))}


BENCHES = benches(Path(__file__).parent)


def write(path: Path, result: dict[str, Any]) -> None:
    """Write JSON atomically, a line for each case: a reader, or a crash, never sees half a file.

    Raises:
        ValueError: the result holds NaN or an infinity, which JSON has no word for.
        OSError: the folder can't be written; an older file of that name is left as it was.
    """

    def entry(value: Any) -> str:
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            return "[\n  {}\n ]".format(",\n  ".join(map(line, value)))
        return line(value)

    line = partial(json.dumps, allow_nan=False, ensure_ascii=False)
    entries = (f" {line(key)}: {entry(value)}" for key, value in {"format": FORMAT, **result}.items())
    replace(path, "{{\n{}\n}}\n".format(",\n".join(entries)).encode())


def replace(path: Path, content: bytes) -> None:
    """Put ``content`` in the place of ``path`` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 is meant for secrets
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ValueError: it is not one, naming the file and what is wrong.
    """
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: must be JSON, got {error}") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        found = result.get("format") if isinstance(result, dict) else type(result).__name__
        raise ValueError(f"{path.name}: format must be {FORMAT}, got {found!r}")
    return result


def tidy(value: Any, digits: int = 5) -> Any:
    """A nested structure fit for publishing.

    Floats are kept at ``digits`` significant digits (more is noise, and makes diffs long); absolute paths,
    which error messages like to hold, are cut from texts.

    Example:
        >>> tidy({"a": (1.23456789, "can't open /home/someone/file.txt: no such file")})
        {'a': [1.2346, "can't open <path>: no such file"]}
    """
    if isinstance(value, dict):
        return {key: tidy(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(item, digits) for item in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{digits}g}")
    if isinstance(value, str):
        return ABSOLUTE_PATH.sub("<path>", value)
    return value
