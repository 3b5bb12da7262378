import gc
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness import MIN_ROUNDS, Contender, Timing, WrongAnswer, measure, ratios, summarize

TIMES = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=50)


def right(answer: object) -> str:
    return "right"


@given(TIMES)
def test_summary_is_numpys(samples):
    summary = summarize(samples)
    expected = np.percentile(samples, [25, 50, 75])
    np.testing.assert_allclose([summary["q1"], summary["median"], summary["q3"]], expected)
    assert summary["min"] == min(samples)
    assert summary["samples"] == len(samples)


def test_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        summarize([])


def test_the_two_ratios_are_of_medians_and_by_round():
    ratio = ratios(Timing("ours", [1.0, 2.0, 10.0]), Timing("other", [3.0, 2.0, 40.0]))
    assert ratio["of_medians"] == 1.5  # 3 / 2
    assert ratio["by_round"] == 3.0  # the median of 3, 1 and 4
    assert ratio["by_round_q1"] == 2.0
    assert ratio["by_round_q3"] == 3.5


def test_a_wrong_answer_is_never_timed():
    calls = []

    def check(answer: object) -> str:
        raise WrongAnswer("off by one")

    timings = measure(
        [
            Contender("wrong", lambda: calls.append(0), check),
            Contender("right", lambda: time.sleep(2e-3), right),
        ],
        seconds=0,
    )
    assert len(calls) == 1  # the one that was checked
    assert timings["wrong"].summary() == {"failure": "wrong answer: off by one"}
    assert timings["right"].summary()["samples"] == MIN_ROUNDS


def test_a_fault_of_one_contender_is_reported_and_ends_nobody_else():
    def broken() -> None:
        raise ModuleNotFoundError("No module named 'peer'\nmore")

    timings = measure([Contender("broken", broken, right), Contender("fine", lambda: None, right)], seconds=0)
    assert timings["broken"].summary() == {"failure": "ModuleNotFoundError: No module named 'peer'"}
    assert timings["fine"].seconds


def test_rounds_interleave_in_a_rotating_order():
    order = []

    def contender(name: str) -> Contender:
        def run() -> None:
            order.append(name)
            time.sleep(1.5e-3)  # longer than the least sample: called once a round

        return Contender(name, run, right)

    measure([contender(name) for name in "abc"], seconds=0, min_rounds=4)
    assert order[:6] == list("abcabc")  # checked, then tried for length
    assert order[6:] == list("abcbcacababc")


def test_some_take_part_in_few_rounds_and_do_part_of_the_work():
    few = Contender("few", lambda: time.sleep(2e-3), right, samples=2, share=0.5)
    timings = measure([few, Contender("all", lambda: time.sleep(1.1e-3), right)], seconds=0, min_rounds=6)
    assert len(timings["few"].seconds) == 2
    assert len(timings["all"].seconds) == 6
    record = timings["few"].summary()
    assert record["min"] >= 4e-3  # counts for all of it
    assert record["share"] == 0.5
    assert "share" not in timings["all"].summary()


def test_rounds_are_bounded_and_a_short_call_is_timed_by_the_call(monkeypatch):
    monkeypatch.setattr("benchmarks.harness.MAX_ROUNDS", 7)
    (timing,) = measure([Contender("quick", lambda: None, right)], seconds=1e9).values()
    assert len(timing.seconds) == 7
    assert 0 < min(timing.seconds) < 1e-4  # not the millisecond that a sample takes


def test_the_garbage_collector_comes_back():
    seen = []
    measure([Contender("looks", lambda: seen.append(gc.isenabled()), right)], seconds=0, min_rounds=1)
    assert seen[0]  # the checked call runs as usual
    assert not any(seen[1:])
    assert gc.isenabled()


def test_names_differ():
    twice = Contender("twice", lambda: None, right)
    with pytest.raises(ValueError, match="different names"):
        measure([twice, twice], seconds=0)
