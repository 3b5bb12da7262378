"""What this installation is, what it runs on, and which backends can run: ``python -m fastsparse info``."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastsparse
from fastsparse.backend import backends, compiled


def environment() -> dict[str, Any]:
    """Describe this environment, for a bug report or the provenance of a measurement.

    Returns:
        A JSON-ready dict: versions, the CPU, the compiled parts (or why they are missing), CUDA devices, and
        the backends, each with whether it can run here and what it is or why it can't.

    Example:
        >>> from fastsparse.info import environment
        >>> environment()["backends"]["reference"]["available"]
        True
    """
    return {
        "fastsparse": fastsparse.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "cores": _cores(), "torch_threads": torch.get_num_threads()},
        "compiled": compiled(),
        "cuda": _cuda(),
        "backends": {
            name: {"available": backend.available, "detail": backend.detail}
            for name, backend in backends().items()
        },
    }


def report(described: dict[str, Any]) -> str:
    """The description as indented lines for people."""
    return "\n".join(_lines(described))


def _lines(described: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    width = max(map(len, described), default=0)
    for name, value in described.items():
        if isinstance(value, dict) and "available" in value:
            value = f"{'available' if value['available'] else 'unavailable'}: {value['detail']}"
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            lines.append(f"{indent}{name:<{width}}  {shown}")
    return lines


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    """The processor's name; Python's platform module does not know it on Linux."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cuda() -> dict[str, Any]:
    if torch.version.cuda is None and torch.version.hip is None:
        return {"available": False, "detail": "this PyTorch is built without CUDA"}
    if not torch.cuda.is_available():
        return {"available": False, "detail": "no device was found"}
    devices = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.1f} GiB"
        )
    return {"toolkit": torch.version.cuda or torch.version.hip, **devices}
