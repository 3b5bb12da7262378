"""Where figures come from: the machine's kind, versions and commit; never a path, a user or a host name."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastsparse

ROOT = Path(__file__).parents[1]
# What differs from the commit, or isn't in it, of all that figures come from: a file that is there is built.
SOURCES = ("benchmarks", "csrc", "examples", "fastsparse", "kernels", "setup.py")
WRITTEN = (":!benchmarks/results", ":!examples/experiments/results")
CHANGES = ("status", "--porcelain", "--", *SOURCES, *WRITTEN)
PEERS = (
    "faiss-cpu", "eai-sparsify", "sae-lens", "dictionary-learning", "overcomplete", "spams-bin",
    "scikit-learn", "pararnn-torch",
)  # fmt: skip
GPU_PEERS = ("triton", "flashinfer-python", "pararnn-torch", "flashrnn")

# AMD's model numbers, first and last of a range, by family ("Revision Guide" of each family).
ZEN = {
    23: (("zen", 0x00, 0x2F), ("zen2", 0x30, 0xAF)),
    25: (
        ("zen3", 0x00, 0x0F), ("zen4", 0x10, 0x1F), ("zen3", 0x20, 0x5F), ("zen4", 0x60, 0x7F), ("zen4", 0xA0,
        0xAF),
    ),
    26: (("zen5", 0x00, 0x7F),),
}  # fmt: skip


def provenance() -> dict[str, Any]:
    """Everything that a figure depends on, ready for JSON."""
    cpu = fastsparse.backends()["cpu"]
    commit = _git("rev-parse", "--short=12", "HEAD")
    return {
        "machine": machine_kind(),
        "cpu": _cpuinfo().get("model name", platform.processor() or platform.machine()),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "fastsparse": fastsparse.__version__,
        "backend": cpu.detail if cpu.available else "reference: the compiled kernels are not here",
        "commit": commit,
        "modified": None if commit is None else bool(_git(*CHANGES)),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": _versions(PEERS),
    }


def gpu_provenance() -> dict[str, Any]:
    """The same of a run on the current CUDA device."""
    origin = provenance()
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    backends = fastsparse.backends()
    own = {
        "machine": re.sub(r"[^a-z0-9]+", "-", f"gpu-{device.name}".lower()).strip("-"),
        "gpu": device.name,
        "compute_capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "gpu_memory_gib": round(device.total_memory / 2**30),
        "l2_mib": round(getattr(device, "L2_cache_size", 0) / 2**20),
        "driver": _driver(),
        "cuda": torch.version.cuda or torch.version.hip,
        "backends": {name: str(backends[name]) for name in ("triton", "cuda")},
        "versions": _versions(GPU_PEERS),
    }
    return {key: value for key, value in origin.items() if key != "backend"} | own


def machine_kind() -> str:
    """A folder name for machines alike, such as ``cpu-amd-zen4-avx512-2core``.

    Example:
        >>> machine_kind().startswith("cpu-")
        True
    """
    info = _cpuinfo()
    vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(
        info.get("vendor_id", ""), platform.machine()
    )
    family, model = int(info.get("cpu family", 0)), int(info.get("model", 0))
    design = next((name for name, low, high in ZEN.get(family, ()) if low <= model <= high), None)
    if vendor == "intel":
        design = f"family{family}-model{model}"
    level = torch.backends.cpu.get_cpu_capability().lower()
    kind = "-".join(part for part in ("cpu", vendor, design, level, f"{cores()}core") if part)
    return re.sub(r"[^a-z0-9-]+", "", kind.lower())


def cores() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _driver() -> str | None:
    """The NVIDIA driver's version; None where there is no telling."""
    said = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
    return said.split("\n")[0].strip() or None


def _versions(distributions: tuple[str, ...]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _git(*arguments: str) -> str | None:
    """git's answer about this checkout; None where there is none, though it stand in another repository."""
    return _said("git", *arguments, GIT_CEILING_DIRECTORIES=str(ROOT.parent))


def _said(*command: str, **environment: str) -> str | None:
    """What a command prints in this checkout; None where it is not there, or fails."""
    options = {"cwd": ROOT, "env": os.environ | environment, "capture_output": True, "text": True}
    try:
        result = subprocess.run(command, timeout=30, **options)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
