"""The report: one HTML file that needs nothing else, no network and no script."""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from fastsparse.demo.charts import density_histogram, fvu_curve, milliseconds, step_bars
from fastsparse.demo.comparison import Comparison
from fastsparse.demo.features import Example, Feature
from fastsparse.demo.style import STYLE

OPEN_EXAMPLES = 3  # of each feature; the others unfold
TITLE_WORDS = 4


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything that the report shows.

    Attributes:
        d_model, num_latents, k, batch: sizes.
        steps, fvu_by_step: the training log.
        train_fvu, held_out_fvu: FVU of all training and all held-out tokens, after training.
        l0: mean number of latents that fire on a held-out token.
        counts: (M,) on how many tokens each latent fires, training and held-out.
        num_train, num_held_out: tokens.
        seconds: time spent in training steps.
        comparison: time of a step against dense PyTorch.
        features: the latents to show.
        environment: what ran it, as (name, value).
    """

    d_model: int
    num_latents: int
    k: int
    batch: int
    steps: Sequence[int]
    fvu_by_step: Sequence[float]
    train_fvu: float
    held_out_fvu: float
    l0: float
    counts: np.ndarray
    num_train: int
    num_held_out: int
    seconds: float
    comparison: Comparison
    features: Sequence[Feature]
    environment: Sequence[tuple[str, str]]

    @property
    def dead(self) -> int:
        """How many latents fire on no token at all."""
        return int((self.counts == 0).sum())

    @property
    def tokens_per_second(self) -> float:
        """Of training."""
        return self.steps[-1] * self.batch / self.seconds

    def summary(self) -> str:
        """The figures in five lines, for a terminal."""
        fast, dense = (statistics.median(t) for t in (self.comparison.fastsparse, self.comparison.dense))
        return "\n".join(
            [
                f"FVU            {self.held_out_fvu:.4f} held out, {self.train_fvu:.4f} training text",
                f"L0             {self.l0:.1f} (k = {self.k})",
                f"dead latents   {self.dead:,} of {self.num_latents:,}",
                f"training       {self.steps[-1]:,} steps of {self.batch:,} tokens in {self.seconds:.0f} s, "
                f"{self.tokens_per_second:,.0f} tokens/s",
                f"training step  {milliseconds(fast)}; dense PyTorch {milliseconds(dense)}: "
                f"{self.comparison.speedup:.2f} times as fast, the same answer",
            ]
        )


def write(result: Result, path: Path) -> None:
    """Write the report; it replaces an older one at once, or not at all."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(render(result), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def render(result: Result) -> str:
    """The report as HTML."""
    comparison = result.comparison
    learning = _figure(
        "Learning",
        fvu_curve(result.steps, result.fvu_by_step, result.held_out_fvu),
        "Fraction of the variance that the reconstruction leaves unexplained (FVU), lower is better. Line "
        "and band: mean and range over the training batches. Dashed: text never trained on.",
    )
    density = _figure(
        "Density",
        density_histogram(result.counts, result.num_train + result.num_held_out),
        "Latents by how often they fire, over all of the text. A good dictionary is made of rare, specific "
        "latents; one that never fires is wasted.",
    )
    speed = _figure(
        "Speed",
        step_bars([("fastsparse", comparison.fastsparse), ("dense PyTorch", comparison.dense)]),
        f"One training step on {result.batch:,} tokens: forward, backward, Adam, unit norms. Median and "
        f"quartiles of {len(comparison.dense)} interleaved rounds. Checked first: the losses differ by "
        f"{_tiny(comparison.loss_error)}, the gradients by {_tiny(comparison.gradient_error)} (relative).",
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>fastsparse: what MiniLM notices</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{_header(result)}
{_tiles(result)}
<section class="charts">
{learning}
{density}
{speed}
</section>
{_features(result)}
{_footer(result)}
</main>
</body>
</html>
"""


def _tiny(error: float) -> str:
    return f"{error:.0e}" if error else "nothing"


def _header(result: Result) -> str:
    return f"""<header>
<p class="eyebrow">fastsparse demo</p>
<h1>What a small language model notices while it reads the Python manual</h1>
<p class="lede">MiniLM read {result.num_train + result.num_held_out:,} tokens of Python&rsquo;s language
reference. Halfway up the model, every token is a vector of {result.d_model} numbers.
A sparse autoencoder learned to write each of these vectors as a sum of at most {result.k} out of
{result.num_latents:,} directions, its <em>latents</em>. Many turn out to stand for something:
<a href="#features">read for yourself</a>.</p>
</header>"""


def _tiles(result: Result) -> str:
    comparison = result.comparison
    tiles = [
        (
            f"{1 - result.held_out_fvu:.1%}",
            "variance explained",
            f"FVU {result.held_out_fvu:.3f} on {result.num_held_out:,} tokens never trained on, "
            f"{result.train_fvu:.3f} on the training text",
        ),
        (f"{result.l0:.1f}", "latents a token (L0)", f"k = {result.k}, on the held-out text"),
        (
            f"{result.dead:,}",
            "dead latents",
            f"{result.dead / result.num_latents:.1%} of {result.num_latents:,} never fire",
        ),
        (
            f"{comparison.speedup:.1f}\N{MULTIPLICATION SIGN}",
            "the speed of dense PyTorch",
            f"whole training step, ratio of medians of {len(comparison.dense)}, the same answer",
        ),
        (
            f"{result.seconds:,.0f} s",
            "of training",
            f"{result.steps[-1]:,} steps of {result.batch:,} tokens, "
            f"{result.tokens_per_second:,.0f} tokens/s",
        ),
    ]
    items = (
        f"<li><strong>{escape(value)}</strong> <b>{escape(name)}</b> <span>{escape(detail)}</span></li>"
        for value, name, detail in tiles
    )
    return f'<ul class="tiles">{"".join(items)}</ul>'


def _figure(title: str, svg: str, caption: str) -> str:
    return f"<figure><h2>{escape(title)}</h2>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _features(result: Result) -> str:
    if not result.features:
        return """<section id="features"><h2>Features</h2>
<p>No latent fires in enough windows to be shown. Train for more steps.</p></section>"""
    return f"""<section id="features">
<h2>{len(result.features)} telling latents</h2>
<p class="how">Each with contexts where it is strong, every one from another part of the text, on different
words where there are any. The deeper the colour, the stronger the activation. Nobody picked or named them.
They are ranked by dominance (how much of a token&rsquo;s reconstruction is due to this one latent)
times spread (how evenly its contexts come from all topics) times variety (whether it answers to a meaning
rather than to a spelling). <span class="held">held out</span> marks text that the autoencoder never trained
on.</p>
<div class="cards">{"".join(map(_card, result.features))}</div>
</section>"""


def _card(feature: Feature) -> str:
    words = "".join(f"<li><code>{escape(word)}</code> {share:.0%}</li>" for word, share in feature.words)
    examples = [_example(example, feature.peak) for example in feature.examples]
    shown, rest = "".join(examples[:OPEN_EXAMPLES]), examples[OPEN_EXAMPLES:]
    more = f"<details><summary>{len(rest)} more</summary>{''.join(rest)}</details>" if rest else ""
    title = ", ".join(escape(word) for word in _peaks(feature)[:TITLE_WORDS])
    return f"""<article>
<h3>{title} <span class="latent">latent {feature.latent}</span></h3>
<ul class="words" title="share of its total activation">{words}</ul>
{shown}{more}
<p class="facts">fires on {feature.count:,} tokens ({feature.frequency:.2%}), at most {feature.peak:.1f};
score {feature.score:.2f}</p>
</article>"""


def _peaks(feature: Feature) -> list[str]:
    """The words at the peaks of a feature's examples, each once."""
    return list(dict.fromkeys(example.word for example in feature.examples))


def _example(example: Example, peak: float) -> str:
    pieces = "".join(_piece(text, activation, peak, top) for text, activation, top in example.pieces)
    held_out = ' <span class="held">held out</span>' if example.held_out else ""
    source = f"<footer>{escape(example.topic)}{held_out}</footer>"
    return f"<blockquote><p>&hellip;{pieces}&hellip;</p>{source}</blockquote>"


def _piece(text: str, activation: float, peak: float, top: bool) -> str:
    if activation <= 0:
        return escape(text)
    kind = ' class="top"' if top else ""
    return f'<mark{kind} style="--a:{activation / peak:.2f}" title="{activation:.2f}">{escape(text)}</mark>'


def _footer(result: Result) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in result.environment)
    return f"""<footer class="page">
<h2>How this was made</h2>
<dl>{rows}</dl>
<p>Made by <code>python -m fastsparse.demo</code>. Run it again: what is finished is found and used
again, and an interrupted training goes on where it stopped.</p>
</footer>"""
