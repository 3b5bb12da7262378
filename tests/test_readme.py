"""The README keeps its word: its examples run, its links lead somewhere, its variables exist."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
DEFINES = {"FASTSPARSE_ISA", "FASTSPARSE_CUDA_CONTENTS"}  # of the compiler: not the user's
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert scope["W_enc"].grad.shape == (scope["M"], scope["D"])
    assert torch.equal(scope["slow_but_simple"].indices, scope["indices"])


def test_files_that_are_linked_exist():
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (ROOT / target).is_file(), (document, target)


def test_variables_are_read_somewhere():
    sources = [ROOT / "setup.py", *(ROOT / "fastsparse").rglob("*.py")]
    code = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    named = set(re.findall(r"FASTSPARSE_[A-Z_]+", README))
    assert named == set(re.findall(r"FASTSPARSE_[A-Z_]+", code)) - DEFINES


def test_make_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
        assert named
        assert named <= verbs


def test_the_results_have_one_place():
    assert README.count("<!-- benchmarks:begin -->") == README.count("<!-- benchmarks:end -->") == 1
