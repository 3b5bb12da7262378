"""The examples run, in a fast mode, and say what they are there to say."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
# How many training steps, and what is printed of them: a pattern whose numbers are checked.
RUNS = {
    "train_sae": (100, r"FVU ([\d.]+)", lambda fvu: fvu == sorted(fvu)[::-1] and fvu[-1] < 0.6),
    "matching_pursuit_sae": (
        60,
        r"k = .*: matching pursuit ([\d.]+)",
        lambda left: left == sorted(left)[::-1],
    ),
    "para_gru_lm": (30, r"([\d.]+) bits a character", lambda bits: 2 < bits[-1] < bits[0] < 6),
    "custom_recurrence": (8, r"by ([\d.e-]+)", lambda errors: len(errors) == 2 and max(errors) < 1e-4),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example(name, monkeypatch, capsys):
    steps, pattern, right = RUNS[name]
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert source.count("\n") < 60
    monkeypatch.setattr(sys, "argv", [name, str(steps)])
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert right([float(number) for number in re.findall(pattern, printed)]), printed
