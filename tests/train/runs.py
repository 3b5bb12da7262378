"""What a training run leaves in its folder, and whether two runs left the same."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

TIMINGS = ("seconds", "tokens_per_second")


def records(path: Path) -> list[dict]:
    """The log without its timings."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def assert_same_run(ours: Path, expected: Path) -> None:
    """Two folders end with the same checkpoint, bit for bit, and the same log but for its timings."""
    found, wanted = (load_file(max(folder.glob("checkpoint-*"))) for folder in (ours, expected))
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    assert records(ours / "log.jsonl") == records(expected / "log.jsonl")
