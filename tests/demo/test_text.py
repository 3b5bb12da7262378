"""The demo's text: cleaning, windows, the split."""

import pytest

from fastsparse.demo.text import clean, language_reference, split, windows


def characters(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    return [ord(c) for c in text], [(i, i + 1) for i in range(len(text))]


def test_clean_keeps_each_paragraph_once_over_all_topics():
    cleaned = clean({"a": "One.\n\nTwo\n  lines.", "b": "Two lines.", "c": "Two  lines.\n \nThree."})
    assert cleaned == {"a": "One. Two lines.", "c": "Three."}


def test_clean_drops_rules_and_table_borders_but_keeps_operators():
    table = "Title\n=====\n\n+---+---+\n| a | b |\n+---+---+\n\nx | y is a union"
    assert clean({"t": table}) == {"t": "Title a b x | y is a union"}


def test_the_language_reference_is_real_and_a_good_part_of_it_is_repetition():
    raw = language_reference()
    cleaned = clean(raw)
    before, after = (sum(len(" ".join(t.split())) for t in topics.values()) for topics in (raw, cleaned))
    assert before > 300_000
    assert 0.5 * before < after < 0.95 * before
    assert "function" in " ".join(cleaned.values())


@pytest.mark.parametrize("size", [1, 3, 4, 5, 26, 100])
def test_windows_hold_every_token_once_and_are_even(size):
    text = "abcdefghijklmnopqrstuvwxyz"
    cut = list(windows({"alphabet": text, "empty": "", "one": "x"}, characters, size))
    joined = "".join(chr(i) for window in cut if window.topic == "alphabet" for i in window.ids)
    assert joined == text
    lengths = [len(window.ids) for window in cut if window.topic == "alphabet"]
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1
    assert [window.topic for window in cut if window.topic != "alphabet"] == ["one"]
    for window in cut:
        assert [window.text[start:end] for start, end in window.spans] == [chr(i) for i in window.ids]


def test_windows_refuse_a_size_without_room():
    with pytest.raises(ValueError, match=r"size must be at least 1, got 0"):
        list(windows({"t": "text"}, characters, 0))


def test_split_is_a_partition_with_every_tenth_held_out():
    cut = list(windows({"t": "x" * 57}, characters, 1))
    train, held_out = split(cut)
    assert len(held_out) == 5
    assert sorted(window.spans[0][0] for window in train + held_out) == list(range(57))
