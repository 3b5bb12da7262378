"""Which latents to show a person: who fires where, a score, and the contexts that speak for each."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastsparse.report.tokens import Tokens

EXAMPLES = 6  # per feature
CONTEXT = 12  # tokens on either side of the peak
WORDS = 5  # likewise
BROADEST = 0.01  # of all tokens


@dataclass(frozen=True)
class Code:
    """Sparse codes of N tokens, with the tokens.

    Attributes:
        values: (E,) float32; a latent fires where its value is above 0.
        indices: (E,) which latents.
        rows: (E,) of which tokens.
        num_latents: M.
        tokens: where each of the N rows came from.
    """

    values: np.ndarray
    indices: np.ndarray
    rows: np.ndarray
    num_latents: int
    tokens: Tokens

    @cached_property
    def firings(self) -> "Firings":
        """Every firing, sorted by latent, strongest first."""
        fired = self.values > 0
        row, value, latent = self.rows[fired], self.values[fired], self.indices[fired]
        energy = np.bincount(self.rows, np.square(self.values, dtype=np.float64))
        order = np.lexsort((row, -value, latent))
        starts = np.searchsorted(latent[order], np.arange(self.num_latents + 1))
        return Firings(value[order], (value**2 / energy[row])[order], row[order], starts)

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.tokens.window_of)

    @cached_property
    def counts(self) -> np.ndarray:
        """(M,) on how many tokens each latent fires."""
        return np.diff(self.firings.starts)


@dataclass(frozen=True)
class Firings:
    """All E firings, sorted by latent, strongest first.

    Attributes:
        value: (E,) activations.
        share: (E,) value^2 over the sum of squares of its token's code: the part of the reconstruction
            that is due to this latent (exactly so for orthogonal unit-norm atoms).
        row: (E,) tokens.
        starts: (M + 1,) where each latent's firings begin.
    """

    value: np.ndarray
    share: np.ndarray
    row: np.ndarray
    starts: np.ndarray

    def of(self, latent: int) -> np.ndarray:
        """The positions of one latent's firings."""
        return np.arange(self.starts[latent], self.starts[latent + 1])


@dataclass(frozen=True)
class Example:
    """A stretch of text around a token where a latent is most active.

    Attributes:
        topic: where the text is from.
        word: the whole word that the token is a piece of, in lower case.
        held_out: whether the SAE never trained on it.
        pieces: (text, activation, whether it is the peak) in reading order; what stands between tokens has
            activation 0.
    """

    topic: str
    word: str
    held_out: bool
    pieces: list[tuple[str, float, bool]]


@dataclass(frozen=True)
class Feature:
    """A latent worth looking at.

    Attributes:
        latent: its index.
        count: on how many tokens it fires.
        frequency: the share of tokens that it fires on.
        peak: its largest activation.
        score: see :func:`scores`.
        words: the words that it fires on most, with the share of its total activation that each accounts for.
        examples: contexts where it is strong, each from another window.
    """

    latent: int
    count: int
    frequency: float
    peak: float
    score: float
    words: list[tuple[str, float]]
    examples: list[Example]


def scores(code: Code, examples: int = EXAMPLES) -> np.ndarray:
    """How telling each latent is to a person who reads its contexts: dominance x spread x variety.

    The first two are taken over the firings that are shown: strong ones, each from another window, of
    different tokens of the vocabulary as far as there are any.

    - dominance: the mean share of the token's reconstruction that is due to this latent. Where it is high,
      the latent is *the* explanation of the token, not one of k small corrections.
    - spread: the entropy of the topics that the contexts come from, over its maximum. Where it is high,
      the latent stands for something that recurs, not for one passage.
    - variety: the chance that two of its firings, drawn in proportion to their activation, are on
      different tokens of the vocabulary. Where it is high, the latent stands for a meaning, not a spelling.

    Unfit are latents that fire on more than 1 % of tokens (too broad to see in a few contexts), and those
    that fire in fewer windows than there are contexts to show (too rare to tell from a memory).

    Args:
        code: the codes of all text.
        examples: how many contexts are shown, at least 2.

    Returns:
        (M,) float64 in [0, 1]; 0 for the unfit.
    """
    result = np.zeros(code.num_latents)
    fit = (code.counts >= examples) & (code.counts <= BROADEST * code.num_tokens)
    for latent in np.flatnonzero(fit):
        best = _contexts(code, latent, examples)
        if len(best) == examples:
            topics = Counter(code.tokens.topics[code.tokens.window_of[code.firings.row[i]]] for i in best)
            parts = np.array(list(topics.values())) / examples
            spread = -(parts * np.log(parts)).sum() / np.log(examples)
            result[latent] = code.firings.share[best].mean() * spread * _variety(code, latent)
    return result


def telling(code: Code, *, count: int = 24, examples: int = EXAMPLES) -> list[Feature]:
    """The features to show, best score first, no two with their peak on the same word.

    Args:
        code: the codes of all text.
        count: how many features at most; fewer come out where fewer latents are fit to be shown.
        examples: how many contexts for each, from as many windows.

    Returns:
        The features.
    """
    ranking = scores(code, examples)
    shown: dict[str, Feature] = {}
    for latent in np.argsort(-ranking, kind="stable").tolist():
        if ranking[latent] == 0 or len(shown) == count:
            break
        feature = _feature(code, latent, float(ranking[latent]), examples)
        shown.setdefault(feature.examples[0].word, feature)
    return list(shown.values())


def _feature(code: Code, latent: int, score: float, examples: int) -> Feature:
    best = _contexts(code, latent, examples)
    return Feature(
        latent=latent,
        count=int(code.counts[latent]),
        frequency=float(code.counts[latent] / code.num_tokens),
        peak=float(code.firings.value[best[0]]),
        score=score,
        words=_words(code, latent)[:WORDS],
        examples=[_example(code, latent, int(code.firings.row[i])) for i in best],
    )


def _contexts(code: Code, latent: int, most: int) -> list[int]:
    """The firings that stand for a latent, one from each window, the peak first.

    New tokens of the vocabulary go first, as long as they reach half of the peak: six times "because"
    says less than "because", "since" and "due". After them, the strongest of the others fill what is left.
    """
    first, last = code.firings.starts[latent : latent + 2].tolist()
    rows = code.firings.row[first:last]
    values = code.firings.value[first:last].tolist()
    firings = list(
        zip(code.tokens.window_of[rows].tolist(), code.tokens.piece_of[rows].tolist(), strict=True)
    )
    windows: set[int] = set()
    pieces: set[int] = set()
    chosen: list[int] = []
    for new_piece in (True, False):
        for i, (window, piece) in enumerate(firings):
            if len(chosen) == most or (new_piece and values[i] < values[0] / 2):
                break
            if window not in windows and not (new_piece and piece in pieces):
                windows.add(window)
                pieces.add(piece)
                chosen.append(first + i)
    return chosen


def _variety(code: Code, latent: int) -> float:
    """Gini-Simpson index of the vocabulary's tokens that a latent fires on, weighted by activation."""
    fired = code.firings.of(latent)
    pieces = np.bincount(code.tokens.piece_of[code.firings.row[fired]], weights=code.firings.value[fired])
    return 1 - float(np.square(pieces / pieces.sum()).sum())


def _words(code: Code, latent: int) -> list[tuple[str, float]]:
    """The words that a latent fires on, with their share of its activation, largest first."""
    totals: Counter[str] = Counter()
    for i in code.firings.of(latent):
        totals[code.tokens.words[code.firings.row[i]]] += float(code.firings.value[i])
    whole = sum(totals.values())
    return [(word, value / whole) for word, value in totals.most_common()]


def _example(code: Code, latent: int, row: int) -> Example:
    """The context of a token, every token in it with the activation of the latent."""
    tokens = code.tokens
    window, place = int(tokens.window_of[row]), int(tokens.place_of[row])
    text, spans = tokens.texts[window], tokens.spans[window].tolist()
    first, last = max(0, place - CONTEXT), min(len(spans), place + CONTEXT + 1)
    fired = code.firings.of(latent)
    activation_of = dict(
        zip(code.firings.row[fired].tolist(), code.firings.value[fired].tolist(), strict=True)
    )
    pieces: list[tuple[str, float, bool]] = []
    for i in range(first, last):
        start, end = spans[i]
        if i > first and spans[i - 1][1] < start:
            pieces.append((text[spans[i - 1][1] : start], 0.0, False))
        pieces.append((text[start:end], activation_of.get(row - place + i, 0.0), i == place))
    return Example(tokens.topics[window], tokens.words[row], tokens.held_out[window], pieces)
