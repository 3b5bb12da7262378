"""What users read keeps its word: examples run, links lead somewhere, variables and verbs exist."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

from fastsparse.__main__ import _parser

ROOT = Path(__file__).parents[1]
DEFINES = {"FASTSPARSE_ISA", "FASTSPARSE_CUDA_CONTENTS"}  # of the compiler: not the user's
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
}
MARKERS = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_examples_run_in_order(page):
    blocks = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    assert blocks
    scope: dict = {}
    for block in blocks:
        exec(compile(block, page, "exec"), scope)
    if page == "docs/guide.md":
        assert scope["W_enc"].grad.shape == (scope["M"], scope["D"])
        assert torch.equal(scope["slow_but_simple"].indices, scope["indices"])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        if not path.startswith("https://"):
            place = (ROOT / page).parent / path if path else ROOT / page
            assert place.exists(), target
            headings = (
                re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            )
            assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def test_commands_are_understood():
    for page in ("README.md", "docs/guide.md"):
        lines = re.findall(r"^(?:python -m )?fastsparse (.*?)(?: +#.*)?$", PAGES[page], re.MULTILINE)
        assert len(lines) >= 3
        for arguments in map(shlex.split, lines):
            _parser(arguments).parse_args(arguments)  # or exits


def test_variables_are_read_somewhere():
    sources = [ROOT / "setup.py", *(ROOT / "fastsparse").rglob("*.py")]
    code = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    named = set(re.findall(r"FASTSPARSE_[A-Z_]+", PAGES["docs/wheels.md"]))
    assert named == set(re.findall(r"FASTSPARSE_[A-Z_]+", code)) - DEFINES


def test_make_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for page, text in PAGES.items():
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
        assert named <= verbs, page
    assert "`make test`" in PAGES["CONTRIBUTING.md"]
    assert "\nmake test " in PAGES["README.md"]


def test_results_are_filled_in_where_they_have_a_place():
    for page, text in PAGES.items():
        filled = page in ("README.md", "docs/benchmarks.md", "docs/drop-in.md")
        assert [text.count(marker) for marker in MARKERS] == [filled] * 2, page


def test_the_chart_is_of_the_results():
    speed = runpy.run_path(str(ROOT / "docs" / "speed.py"))
    assert speed["SVG"].read_text(encoding="utf-8") == speed["chart"](json.loads(speed["RESULT"].read_text()))


@pytest.mark.parametrize("name", ["api", "ops"])
def test_what_the_code_says_itself_is_on_its_page(name):
    page = runpy.run_path(str(ROOT / "docs" / f"{name}.py"))
    assert page["PAGE"].read_text() == page["page"](), f"python docs/{name}.py writes it anew"
