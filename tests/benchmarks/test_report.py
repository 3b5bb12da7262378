import pytest

from benchmarks import report, results
from benchmarks.bars import Bar, speed_bars, table


def case(name: str, ours: float, others: dict[str, float], *, headline: bool = True) -> dict:
    contenders = {"fastsparse": {"median": ours, "unit": "s", "check": "right"}}
    ratios = {other: {"of_medians": seconds / ours} for other, seconds in others.items()}
    shape = {"N": 4, "D": 8, "M": 16, "k": 2}
    facts = {"name": name, "shape": shape, "headline": headline}
    return {**facts, "contenders": contenders, "ratios": {"fastsparse": ratios}}


def result(cases: list[dict], bars: tuple[Bar, ...] = (), **changes) -> dict:
    origin = {
        "cpu": "A CPU", "cores": 2, "instruction_set": "AVX512", "threads": 2, "torch": "2.13.0",
        "commit": "abc", "modified": True, "date": "2025-01-01",
    }  # fmt: skip
    base = {"bench": "topk_encode", "peers": False, "quick": False, "provenance": origin}
    return base | {"cases": cases, "bars": [bar.record() for bar in bars]} | changes


@pytest.fixture
def place(tmp_path):
    """A page and results with one machine: a run of our own and a peers' run."""
    for name in report.FILLED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# title\n{report.BEGIN}\nold\n{report.END}\nrest\n")
    folder = tmp_path / "results" / "cpu-kind-2core"
    bars = (
        Bar("fast enough", ">=", 2.0, 2.5),
        Bar("not yet", ">=", 2.0, 1.5),
        Bar("unknown", ">", 1, None, note="why"),
    )
    own = result(
        [case("wide", 0.1, {"torch": 0.25}), case("hidden", 0.1, {"torch": 0.2}, headline=False)], bars
    )
    results.write(folder / "topk_encode.json", own)
    results.write(
        folder / "topk_encode-peers.json", result([case("wide", 0.11, {"faiss": 0.22})], peers=True)
    )
    return tmp_path / "docs" / "benchmarks.md", tmp_path / "results"


def run(place, *extra: str) -> int:
    page, folder = place
    return report.main(["--root", str(page.parents[1]), "--results", str(folder), *extra])


def filled(place, **files: dict) -> str:
    """The page once these results are there too."""
    for stem, found in files.items():
        results.write(place[1] / "cpu-kind-2core" / f"{stem.replace('__', '-')}.json", found)
    assert run(place) == 0
    return place[0].read_text()


def test_the_block_is_filled_and_the_rest_kept(place):
    text = filled(place)
    assert text.startswith(f"# title\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nrest\n")
    assert "old" not in text
    assert "hidden" not in text
    assert "(2025-01-01, commit abc with changes)" in text
    # A row for the case, its time from our own run, a column from each run.
    assert "| wide | N=4 D=8 M=16 k=2 | 100 ms | 2.50x | 2.00x |" in text
    assert "| topk_encode | shape | fastsparse | torch | faiss |" in text


def test_the_readme_shows_the_kinds_side_by_side(place):
    page, folder = place
    found = result([case("wide, gaussian", 0.1, {"torch": 0.31, "faiss": 0.2})], peers=True)
    results.write(folder / "cpu-amd-zen3-avx2-2core" / "topk_encode-peers.json", found)
    assert run(place) == 0
    text = (page.parents[1] / "README.md").read_text()
    assert "| how many times as fast | AMD Zen 3, AVX2, 2 cores | kind 2 cores |" in text
    assert "| `topk_encode` against PyTorch | 3.1x |  |" in text
    assert "| `topk_encode` against FAISS | 2.0x |  |" in text
    assert text.startswith("# title\n")
    newer = result([case("wide, gaussian", 0.1, {"torch": 0.5})], peers=True)
    results.write(folder / "cpu-amd-zen3-avx2-2core" / "topk_encode-peers.json", newer)
    assert run(place, "--check") == 1


def test_steps_under_other_libraries_are_shown_by_kind(place):
    page, folder = place
    faster = case("SAELens TopK", 0.25, {"as it is": 2.0})
    faster["contenders"] |= {"as it is": {"median": 2.0}, "fastsparse, relayout_": {"median": 0.2}}
    for name in ("cpu-amd-zen3-avx2-2core", "cpu-amd-zen5-avx512-2core"):
        cases = [faster] if "zen3" in name else [faster | {"name": "another"}]
        results.write(folder / name / "drop_in-peers.json", result(cases, bench="drop_in", peers=True))
    assert run(place) == 0
    text = (page.parent / "drop-in.md").read_text()
    assert "| step | AMD Zen 3, AVX2, 2 cores: as it is | with the line |" in text
    assert "| SAELens TopK | 2 s | 250 ms, 8.0x | 200 ms, 10.0x |  |  |  |" in text


def test_every_bench_has_a_table_with_its_own_columns(place):
    pursuit = {"bench": "matching_pursuit"}
    own = result([case("kept", 0.1, {"torch": 0.4})], **pursuit)
    signed = case("signed", 0.1, {"OMP": 3.0})
    signed["contenders"]["OMP"] = {"median": 3.0, "share": 0.25}
    peers = result([case("kept", 0.1, {"SAELens": 0.5}), signed], **pursuit, peers=True)
    dispatch = result([case("hidden", 1, {}, headline=False)], bench="dispatch")
    text = filled(place, matching_pursuit=own, matching_pursuit__peers=peers, dispatch=dispatch)
    assert "| topk_encode | shape | fastsparse | torch | faiss |" in text
    assert "| matching_pursuit | shape | fastsparse | torch | SAELens | OMP |" in text
    assert "| kept | N=4 D=8 M=16 k=2 | 100 ms | 4.00x | 5.00x |  |" in text
    assert "| signed | N=4 D=8 M=16 k=2 | 100 ms |  |  | 30.00x\\* |" in text
    assert "\\* That library was timed on part of the tokens" in text
    assert "| dispatch |" not in text  # of which nothing is shown


def test_a_copy_is_explained_where_it_is_a_column(place):
    said = "copy is a copy through memory of as many bytes as the op reads and writes."
    assert said not in filled(place)
    recurrence = result([case("layer", 0.1, {"copy": 0.06, "torch loop": 5.0})], bench="gru_recurrence")
    text = filled(place, gru_recurrence=recurrence)
    assert said in text
    assert "| layer | N=4 D=8 M=16 k=2 | 100 ms | 0.60x | 50.00x |" in text


def test_what_is_missed_is_said(place):
    text = filled(place)
    assert "1 of 3 required figures stand; these don't:" in text
    assert "- missed: not yet: >= 2 x, got 1.5 x" in text
    assert "- missed: unknown: > 1 x, got not measured (why)" in text


def test_check_fails_when_stale_and_writes_nothing(place, capsys):
    before = place[0].read_bytes()
    assert run(place, "--check") == 1
    assert "stale" in capsys.readouterr().err
    assert place[0].read_bytes() == before
    run(place)
    assert run(place, "--check") == 0
    newer = result([case("wide", 0.05, {"torch": 0.25})])
    results.write(place[1] / "cpu-kind-2core" / "topk_encode.json", newer)
    assert run(place, "--check") == 1


@pytest.mark.parametrize(
    "text", ["", report.BEGIN, f"{report.END}{report.BEGIN}", (report.BEGIN + report.END) * 2]
)
def test_markers_must_be_there_once(place, capsys, text):
    place[0].write_text(text)
    assert run(place) == 2
    assert "once each" in capsys.readouterr().err
    assert place[0].read_text() == text


def test_no_results_and_quick_results_are_refused(place, capsys, tmp_path):
    assert report.main(["--root", str(tmp_path), "--results", str(tmp_path / "none")]) == 2
    assert "found none" in capsys.readouterr().err
    results.write(place[1] / "cpu-kind-2core" / "sae_step.json", result([], quick=True))
    assert run(place) == 2
    assert "quick trial" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("relation", "required", "measured", "passed"),
    [
        (">=", 2.0, 2.0, True), (">", 2.0, 2.0, False), ("<=", 2.0, 2.0, True), ("<", 2.0, 2.0, False),
        (">=", 2.0, 1.9, False), ("<", 2.0, 1.9, True), (">=", 2.0, None, False),
    ],
)  # fmt: skip
def test_bars_stand_or_fall(relation, required, measured, passed):
    assert Bar("a", relation, required, measured).passed is passed


def test_a_bar_without_a_figure_says_why():
    wrong = case("wide", 0.1, {})
    wrong["contenders"]["torch"] = {"failure": "wrong answer: off"}
    bars = speed_bars("a", {"torch": 2.0, "faiss": 2.0}, wrong)
    assert [bar.note for bar in bars] == ["torch: wrong answer: off", "faiss: not run"]
    lines = table([bars[0], Bar("b", ">=", 1.0, 1.5)]).splitlines()
    assert lines[0].startswith("stands        b")  # what failed comes last
    assert "not measured" in lines[1]
