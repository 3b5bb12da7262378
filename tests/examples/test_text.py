"""The demo's text."""

from examples.demo.text import clean, language_reference


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
