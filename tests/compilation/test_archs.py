"""CI compiles for one GPU alone only what has been compiled for all."""

import os

import pytest

from compilation import archs

EVERY = [{"target": f"sm_{arch}"} for arch in archs.setup.CUDA_ARCHS]


@pytest.fixture
def built(monkeypatch, tmp_path):
    """A source, and a library that was built of it since."""
    source, library = tmp_path / "op.cuh", tmp_path / "_ops_cuda.so"
    for time, path in enumerate((source, library)):
        path.write_text("")
        os.utime(path, (time, time))
    monkeypatch.setattr(archs, "RECORD", tmp_path / "archs.json")
    monkeypatch.setattr(archs, "sources", lambda: [source])
    monkeypatch.setattr(archs, "key", source.read_text)
    monkeypatch.setattr(archs, "cuda_library", lambda: (library, None))
    monkeypatch.setattr(archs.setup, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(archs.setup, "cuda_toolkit", lambda: "13.0")
    return source, library


def test_one_gpu_is_enough_until_something_changes(monkeypatch, built):
    source, _ = built
    assert archs.wanted() == ""
    archs.note(EVERY)
    assert archs.wanted() == archs.ONE
    monkeypatch.setattr(archs.setup, "cuda_toolkit", lambda: "12.9")
    assert archs.wanted() == ""
    monkeypatch.setattr(archs.setup, "cuda_toolkit", lambda: "13.0")
    source.write_text("changed")
    assert archs.wanted() == ""
    archs.note(EVERY)  # of a library that is older than that
    assert archs.wanted() == ""
    os.utime(source, (0, 0))
    archs.note(EVERY)
    assert archs.wanted() == archs.ONE


def test_a_library_for_some_gpus_says_nothing(built):
    archs.note(EVERY[1:])
    assert archs.wanted() == ""


def test_device_code_is_what_counts():
    names = {path.name for path in archs.sources()}
    assert {"cells.h", "screen.cuh", "topk_encode.cu", "edge.h"} <= names
    assert not {"simd.h", "tensors.cpp", "setup.py"} & names
    assert int(archs.ONE) in archs.setup.CUDA_ARCHS
