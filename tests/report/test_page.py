"""The page: escaping, self-containment, and that it shows what it was given."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from fastsparse.report.charts import density_histogram, fvu_curve, ticks
from fastsparse.report.features import Example, Feature
from fastsparse.report.page import Panel, Result, Scores, render, write

EVIL = "<script>alert(1)</script> & \"quotes\" 'too'"


def feature(text: str = "because", examples: int = 6) -> Feature:
    pieces = [("it stops ", 0.0, False), (text, 2.0, True), (" ", 0.0, False), ("it", 1.0, False)]
    return Feature(
        latent=17,
        count=42,
        frequency=0.0042,
        peak=4.0,
        score=0.25,
        words=[(text, 0.75)],
        examples=[Example(text, text, i == 0, pieces) for i in range(examples)],
    )


@pytest.fixture
def result() -> Result:
    log = [
        {"step": step, "tokens": 100 * step, "fvu": fvu, "tokens_per_second": 500.0}
        for step, fvu in ((5, 0.9), (10, 0.5), (15, 0.25))
    ]
    return Result(
        title="What it notices",
        place="residual stream after layer 3",
        d_model=384,
        num_latents=4,
        batch=100,
        log=log,
        training=Scores(900, 0.2, 1.8),
        held_out=Scores(100, 0.3, 1.9),
        counts=np.array([0, 1, 50, 400]),
        features=[feature()],
        panels=[
            Panel("Speed", "<svg></svg>", "A step.", ("5.0\N{MULTIPLICATION SIGN}", "the speed", "of dense"))
        ],
        environment=[("processor", "a CPU")],
    )


class Strict(HTMLParser):
    """Collects tags, attributes and text, and fails where elements are not closed in order."""

    VOID = frozenset({"meta"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_the_page_is_well_formed_and_needs_nothing_else(result):
    page = render(result)
    parsed = Strict(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.seen)
    links = [value for name, value in parsed.attributes if name in ("src", "href")]
    assert links == ["#features"]
    assert not re.search(r"https?:|@import|url\(", page)
    assert parsed.seen.count("svg") == 3


def test_figures_of_the_result_stand_in_the_page(result):
    text = Strict(render(result)).text
    for figure in (
        *("70.0%", "FVU 0.300", "0.200 on the training", "1.9", "1,000 tokens", "15 steps of"),
        *("What it notices", "residual stream after layer 3", "latent 17", "held out"),
        *("A step.", "5.0\N{MULTIPLICATION SIGN}", "25.0% of 4 never fire"),
    ):
        assert figure in text


def test_everything_from_outside_is_escaped(result):
    evil = replace(result, title=EVIL, place=EVIL, features=[feature(EVIL)], environment=[(EVIL, EVIL)])
    page = render(replace(evil, panels=[Panel(EVIL, "<svg></svg>", EVIL, (EVIL, EVIL, EVIL))]))
    parsed = Strict(page)
    assert "script" not in parsed.seen
    # Examples and their labels, environment, title twice, place, the panel.
    assert parsed.text.count(EVIL) >= 6 + 6 + 2 + 3 + 5
    assert not any(value and "alert" in value for _, value in parsed.attributes)


def test_marks_are_as_deep_as_the_activation(result):
    page = render(result)
    assert '<mark class="top" style="--a:0.50" title="2.00">because</mark>' in page
    assert '<mark style="--a:0.25" title="1.00">it</mark>' in page
    assert "it stops <mark" in page


@pytest.mark.parametrize(("examples", "more"), [(2, None), (3, None), (5, "2 more")])
def test_examples_beyond_the_first_unfold(result, examples, more):
    page = render(replace(result, features=[feature(examples=examples)]))
    assert page.count("<blockquote>") == examples
    assert ("<details>" in page) == (more is not None)
    assert more is None or more in page


def test_write_replaces_and_leaves_nothing_half_written(result, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write(result, path)
    first = path.read_text(encoding="utf-8")
    assert first == render(result)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(replace(result, batch=3), path)
    assert path.read_text(encoding="utf-8") == first
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_run_without_features_held_out_text_or_log(result):
    assert "No latent fires in enough windows" in render(replace(result, features=[]))
    bare = replace(result, held_out=None, log=[], panels=[])
    text = Strict(render(bare)).text
    assert "80.0%" in text
    assert "never trained on" not in text
    assert "Learning" not in text
    assert bare.summary().splitlines()[0] == "FVU            0.2000 training text"
    seen = Strict(render(replace(bare, log=result.log)))
    assert "Learning" in seen.text
    assert "held-out text" not in seen.text


def test_summary_holds_the_figures(result):
    summary = result.summary()
    for figure in ("0.3000 held out, 0.2000", "1 of 4", "in 3 s, 500 tokens/s", "Speed          5.0"):
        assert figure in summary


def test_histogram_counts_every_latent_once():
    rng = np.random.default_rng(0)
    counts = np.concatenate([[0, 0, 0, 1, 1000], rng.integers(1, 1000, 500)])
    sizes = re.findall(r"<title>([^:]*): ([\d,]+) latents", density_histogram(counts, 1000))
    assert sum(int(size.replace(",", "")) for _, size in sizes) == len(counts)
    assert sizes[0] == ("never", "3")


def test_curve_of_one_line_and_of_many():
    for lines in (1, 2, 121, 500):
        steps = list(range(1, lines + 1))
        svg = fvu_curve(steps, [1 / step for step in steps])
        points = re.search(r'class="line" points="([^"]*)"', svg)[1].split()
        assert len(points) == min(lines, 120)


@pytest.mark.parametrize("top", [1e-9, 0.77, 1, 9.99, 1234])
def test_ticks_are_few_even_and_within(top):
    marks = ticks(top)
    assert 2 <= len(marks) <= 6
    assert marks[0] == 0
    assert marks[-1] <= top * (1 + 1e-9)
    assert np.allclose(np.diff(marks), marks[1])
    assert ticks(0.0) == [0.0]
