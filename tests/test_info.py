"""The description of the environment."""

import importlib
import json
import platform
import sys
import types

import pytest
import torch

import fastsparse
from fastsparse import info
from fastsparse.__main__ import main


def test_environment_names_every_backend_and_why_not() -> None:
    described = info.environment()
    assert described["fastsparse"] == fastsparse.__version__
    assert described["python"].startswith(platform.python_version())
    assert described["cpu"]["cores"] >= 1
    for name, backend in fastsparse.backends().items():
        assert described["backends"][name] == {"available": backend.available, "detail": backend.detail}
        assert backend.detail
    assert json.loads(json.dumps(described))["backends"] == described["backends"]


def test_compiled_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    host = types.SimpleNamespace(
        build_info=lambda: {"compiler": "some compiler"}, cpu_features=lambda: {"best_level": "some level"}
    )
    monkeypatch.setattr(info, "import_module", lambda name: host)
    assert info.environment()["compiled"] == {
        "build": {"compiler": "some compiler"},
        "cpu_features": {"best_level": "some level"},
    }

    def missing(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(info, "import_module", missing)
    described = info.environment()
    assert described["compiled"] == {
        "available": False,
        "detail": "fastsparse._host can't be imported: no fastsparse._host",
    }
    assert "unavailable: fastsparse._host can't be imported" in info.report(described)


def test_the_real_host_module_is_reported_where_it_is_built() -> None:
    if not fastsparse.backends()["cpu"].available:
        pytest.skip(fastsparse.backends()["cpu"].detail)
    host = importlib.import_module("fastsparse._host")  # built with the kernels: it must be there
    assert info.environment()["compiled"]["build"] == host.build_info()
    assert "avx2" in host.cpu_features() or platform.machine() != "x86_64"


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
