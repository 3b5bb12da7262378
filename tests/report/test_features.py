"""Which latents are shown, and what of them: on codes made by hand."""

from dataclasses import replace

import numpy as np
import pytest

from fastsparse.report.features import CONTEXT, Code, scores, telling
from fastsparse.report.tokens import Tokens

WINDOWS, LENGTH = 8, 200
M = 6
WORDS = ["because", "since", "due", "so"]


def tokens() -> Tokens:
    """Windows of the words "because since due so because ...", one topic each; the last is held out."""
    text = " ".join(WORDS[i % 4] for i in range(LENGTH))
    ends = np.cumsum([len(word) + 1 for word in text.split()]) - 1
    spans = np.stack([np.concatenate([[0], ends[:-1] + 1]), ends], axis=1)
    return Tokens(
        [f"topic {i}" for i in range(WINDOWS)],
        [text] * WINDOWS,
        [spans] * WINDOWS,
        [i == WINDOWS - 1 for i in range(WINDOWS)],
    )


def code(firings: list[tuple[int, int, int, float]]) -> Code:
    """A code of (latent, window, place, value); at most two latents a token, unused slots hold 0."""
    values = np.zeros((WINDOWS * LENGTH, 2), dtype=np.float32)
    indices = np.zeros((WINDOWS * LENGTH, 2), dtype=np.int64)
    for latent, window, place, value in firings:
        row = window * LENGTH + place
        slot = int(values[row, 0] > 0)
        assert values[row, slot] == 0
        values[row, slot], indices[row, slot] = value, latent
    return Code(values.ravel(), indices.ravel(), np.repeat(np.arange(len(values)), 2), M, tokens())


def everywhere(latent: int, place: int, value: float = 2.0) -> list[tuple[int, int, int, float]]:
    return [(latent, window, place + window % 4, value) for window in range(WINDOWS)]


def test_counts_are_of_positive_values_only():
    made = code([(3, 0, 0, 1.0), (3, 1, 5, 2.0), (5, 1, 5, 0.5)])
    assert made.counts.tolist() == [0, 0, 0, 2, 0, 1]


def test_shares_of_a_token_sum_to_one():
    made = code([(1, 0, 0, 3.0), (2, 0, 0, 4.0)])
    assert made.firings.share[made.firings.of(1)] == pytest.approx([9 / 25])
    assert made.firings.share[made.firings.of(2)] == pytest.approx([16 / 25])


def test_a_latent_that_dominates_its_tokens_scores_above_one_that_does_not():
    made = code([*everywhere(1, 40), *everywhere(2, 80, 1.0), *everywhere(3, 80, 3.0)])
    score = scores(made)
    assert score[1] == pytest.approx(1 * 1 * 0.75)  # sole latent, a topic each, four words alike
    assert score[2] == pytest.approx(0.1 * 0.75)
    assert score[3] == pytest.approx(0.9 * 0.75)


def test_spread_is_the_evenness_of_the_topics():
    made = code(everywhere(1, 40))
    half = replace(made.tokens, topics=["a", "b"] * (WINDOWS // 2))
    assert scores(replace(made, tokens=half))[1] == pytest.approx(np.log(2) / np.log(6) * 0.75)
    one = replace(made.tokens, topics=["a"] * WINDOWS)
    assert scores(replace(made, tokens=one))[1] == 0


def test_what_is_not_telling_scores_nothing():
    one_word = [(1, window, 40, 2.0) for window in range(WINDOWS)]
    one_window = [(2, 3, 50 + i, 2.0) for i in range(WINDOWS)]
    rare = [(3, window, 100 + window, 2.0) for window in range(5)]
    broad = [(4, window, 80 + i, 2.0) for window in range(WINDOWS) for i in range(3)]
    assert scores(code(one_word + one_window + rare + broad)).tolist() == [0] * M
    assert scores(code(everywhere(2, 80)))[2] > 0


def test_features_show_peak_words_contexts_and_the_held_out_mark():
    firings = [(1, window, 40 + window % 4, 2.0 + 0.1 * window) for window in range(WINDOWS)]
    (feature,) = telling(code(firings))
    assert (feature.latent, feature.count) == (1, WINDOWS)
    assert feature.frequency == pytest.approx(1 / LENGTH)
    assert feature.peak == pytest.approx(2.7)
    assert {word for word, _ in feature.words} == set(WORDS)
    assert sum(share for _, share in feature.words) == pytest.approx(1)
    # One of each word first, the strongest ahead; then the strongest of what is left.
    assert [example.word for example in feature.examples] == ["so", "due", "since", "because", "so", "due"]
    assert [example.topic for example in feature.examples] == [f"topic {i}" for i in (7, 6, 5, 4, 3, 2)]
    assert [example.held_out for example in feature.examples] == [True, *[False] * 5]
    for example in feature.examples:
        assert [text for text, _, top in example.pieces if top] == [example.word]
        assert sum(activation > 0 for _, activation, _ in example.pieces) == 1
        assert sum(text != " " for text, _, _ in example.pieces) == 2 * CONTEXT + 1


def test_weak_firings_on_new_words_do_not_displace_strong_ones():
    strong = [(1, window, 40, 4.0) for window in range(6)]
    weak = [(1, window, 41, 1.0) for window in (6, 7)]
    (feature,) = telling(code(strong + weak))
    assert [example.word for example in feature.examples] == ["because"] * 6


def test_contexts_stop_at_the_ends_of_a_window():
    (feature,) = telling(code([(1, window, window % 4, 2.0) for window in range(WINDOWS)]))
    for example in feature.examples:
        place = WORDS.index(example.word)
        assert sum(text != " " for text, _, _ in example.pieces) == place + 1 + CONTEXT


def test_no_two_features_peak_on_the_same_word():
    made = code([*everywhere(1, 40), *everywhere(2, 80), *everywhere(3, 121)])
    assert len(telling(made)) == 2
    assert len(telling(made, count=1)) == 1


def test_words_are_whole_though_tokens_are_pieces():
    spans = np.array([[0, 2], [2, 5], [5, 7], [8, 9]])
    made = Tokens(["t"], ["__add__ +"], [spans], [False])
    assert made.words == ["__add__", "__add__", "__add__", "+"]
    assert made.piece_of[0] == made.piece_of[2] != made.piece_of[1]
