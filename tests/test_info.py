"""The description of the environment."""

import importlib
import json
import platform
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import fastsparse
from fastsparse import backend, info
from fastsparse.__main__ import main

needs_library = pytest.mark.skipif(
    backend._cpu.failure is not None, reason=f"there is no CPU library: {backend._cpu.failure}"
)


def test_environment_names_every_backend_and_why_not() -> None:
    described = info.environment()
    assert described["fastsparse"] == fastsparse.__version__
    assert described["python"].startswith(platform.python_version())
    assert described["cpu"]["cores"] >= 1
    for name, found in fastsparse.backends().items():
        assert described["backends"][name] == {"available": found.available, "detail": found.detail}
        assert found.detail
    assert json.loads(json.dumps(described))["backends"] == described["backends"]


def test_compiled_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend._cpu, "failure", "_ops_cpu.so was not built")
    described = info.environment()
    assert described["compiled"] == {"available": False, "detail": "_ops_cpu.so was not built"}
    assert "unavailable: _ops_cpu.so was not built" in info.report(described)


@needs_library
def test_the_library_tells_what_it_is() -> None:
    described = info.environment()["compiled"]
    assert described["build"].keys() == {"compiler", "levels", "sanitized", "cuda"}
    assert re.match(r"(gcc|clang) \d+\.\d+", described["build"]["compiler"])
    assert described["cpu_features"]["best_level"] == backend._cpu.best_level
    assert described["cpu_features"]["best_level"] in described["build"]["levels"]


@needs_library
def test_the_library_finds_what_this_processor_has() -> None:
    """By what Linux says of it: a library that is linked wrongly finds nothing, and is slow in silence."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split()
    except (OSError, TypeError):
        pytest.skip("only Linux on x86-64 lists flags in /proc/cpuinfo")
    found = info.environment()["compiled"]["cpu_features"]
    assert found["avx2"] == ({"avx2", "fma", "bmi2"} <= set(flags))
    assert found["avx512"] == (
        found["avx2"] and {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags)
    )
    assert found["best_level"] == ("avx512" if found["avx512"] else "avx2" if found["avx2"] else "baseline")


@needs_library
def test_the_host_module_says_the_same() -> None:
    try:
        host = importlib.import_module("fastsparse._host")
    except ModuleNotFoundError:
        pytest.skip("fastsparse._host is left out of wheels for every Python")
    assert info.environment()["compiled"] == {
        "build": host.build_info(),
        "cpu_features": host.cpu_features(),
    }


def test_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert info.environment()["cuda"]["available"] is False
    device = types.SimpleNamespace(name="GPU", major=9, minor=0, total_memory=2**37)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    assert info.environment()["cuda"] == {"toolkit": "13.0", "cuda:0": "GPU, sm_90, 128.0 GiB"}


def test_command(capsys: pytest.CaptureFixture) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "reference" in text
    assert torch.__version__ in text
    assert "triton" in text
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["reference"]["available"] is True
    assert "fastsparse.train" in sys.modules or "tqdm" not in text  # info needs no extra
