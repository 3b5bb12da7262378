"""The CUDA library has been compiled against other PyTorchs' headers since it last changed."""

import re
from pathlib import Path

import pytest

from compilation import headers


def test_these_sources_compile_against_other_pytorchs():
    assert headers.record() == dict.fromkeys(headers.VERSIONS, headers.key()), (
        "docs/headers.json is behind: python -m tests.compilation --headers, where nvcc is"
    )


def test_all_that_meets_pytorchs_headers_is_a_source():
    csrc = headers.setup.CSRC

    def meets(path: Path) -> bool:
        names = re.findall(r'#include ["<](\S+)[">]', path.read_text(encoding="utf-8"))
        ours = (csrc / name for name in names)
        return any(name.startswith("torch/") for name in names) or any(p.exists() and meets(p) for p in ours)

    found = {path for folder in (csrc, csrc / "cuda") for path in folder.glob("*.*") if meets(path)}
    assert csrc / "cuda" / "edge.cu" in found
    assert found <= set(headers.sources())


def test_what_fails_is_tried_again_and_what_compiled_is_not(monkeypatch, tmp_path):
    tried, bad = [], {"2.11.0"}

    def compile_against(version: str) -> None:
        tried.append(version)
        if version in bad:
            raise RuntimeError

    monkeypatch.setattr(headers, "RECORD", tmp_path / "headers.json")
    monkeypatch.setattr(headers, "include", lambda version: version)
    monkeypatch.setattr(headers, "compile_against", compile_against)
    monkeypatch.setattr(headers.setup, "nvcc", lambda: None)
    headers.try_all()
    assert not tried
    monkeypatch.setattr(headers.setup, "nvcc", lambda: "nvcc")
    with pytest.raises(RuntimeError):
        headers.try_all()
    assert headers.record() == {"2.10.0": headers.key()}
    bad.clear()
    headers.try_all()
    headers.try_all()
    assert tried == ["2.10.0", "2.11.0", "2.11.0"]
    monkeypatch.setattr(headers, "key", lambda: "changed")
    headers.try_all()
    assert tried[3:] == ["2.10.0", "2.11.0"]
