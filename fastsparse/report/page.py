"""The page: one HTML file that needs nothing else, no network and no script."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from fastsparse._files import replacing
from fastsparse.report.charts import density_histogram, fvu_curve
from fastsparse.report.features import Example, Feature
from fastsparse.report.style import STYLE

OPEN_EXAMPLES = 3  # of each feature; the others unfold
TITLE_WORDS = 4


@dataclass(frozen=True)
class Panel:
    """A figure of the page, and a tile for what it says most of all."""

    title: str
    svg: str
    caption: str
    tile: tuple[str, str, str] | None = None  # figure, name, detail


@dataclass(frozen=True)
class Scores:
    """Of how many tokens, what share of their variance is unexplained, and by how many latents a token."""

    tokens: int
    fvu: float
    l0: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything that the page shows.

    Attributes:
        title: of the page.
        place: where in the model the activations are from.
        d_model, num_latents, batch: sizes.
        log: records of the training log; none where there is no log.
        training, held_out: scores of the two kinds of tokens, after training; None of none.
        counts: (M,) on how many tokens each latent fires, of both kinds.
        features: the latents to show.
        panels: figures beside the page's own.
        environment: what ran it, as (name, value).
    """

    title: str
    place: str
    d_model: int
    num_latents: int
    batch: int
    log: Sequence[dict]
    training: Scores | None
    held_out: Scores | None
    counts: np.ndarray
    features: Sequence[Feature]
    panels: Sequence[Panel]
    environment: Sequence[tuple[str, str]]

    @property
    def tokens(self) -> int:
        """How many were read, of both kinds."""
        return sum(part.tokens for part in (self.training, self.held_out) if part)

    @property
    def best(self) -> Scores:
        """Of what was never trained on, where there is any."""
        return self.held_out or self.training

    @property
    def dead(self) -> int:
        """How many latents fire on no token at all."""
        return int((self.counts == 0).sum())

    @property
    def seconds(self) -> float:
        """Of training: from the rates and not from a clock, as it may have been interrupted."""
        tokens = [0, *(line["tokens"] for line in self.log)]
        return sum(
            (line["tokens"] - before) / line["tokens_per_second"]
            for line, before in zip(self.log, tokens, strict=False)
        )

    def summary(self) -> str:
        """The figures, for a terminal."""
        scores = (("held out", self.held_out), ("training text", self.training))
        shown = ", ".join(f"{part.fvu:.4f} {name}" for name, part in scores if part)
        lines = [
            f"FVU            {shown}",
            f"L0             {self.best.l0:.1f}",
            f"dead latents   {self.dead:,} of {self.num_latents:,}",
        ]
        if self.log:
            lines.append(f"training       {_trained(self)}")
        lines += [f"{panel.title:<14} {panel.tile[0]} {panel.tile[1]}" for panel in self.panels if panel.tile]
        return "\n".join(lines)


def _trained(result: Result) -> str:
    tokens, seconds = result.log[-1]["tokens"], result.seconds
    return (
        f"{result.log[-1]['step']:,} steps of {result.batch:,} tokens in {seconds:,.0f} s, "
        f"{tokens / seconds:,.0f} tokens/s"
    )


def write(result: Result, path: Path) -> None:
    """Write the page; it replaces an older one at once, or not at all."""
    with replacing(path) as file:
        file.write(render(result).encode())


def render(result: Result) -> str:
    """The page as HTML."""
    panels = [_density(result), *result.panels]
    if result.log:
        panels.insert(0, _learning(result))
    figures = "\n".join(_figure(panel.title, panel.svg, panel.caption) for panel in panels)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>fastsparse: {escape(result.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">fastsparse report</p>
<h1>{escape(result.title)}</h1>
<p class="lede">A model read {result.tokens:,} tokens of text. In it ({escape(result.place)}), every token
is a vector of {result.d_model:,} numbers. A sparse autoencoder learned to write each of these vectors as a
sum of a few out of {result.num_latents:,} directions, its <em>latents</em>. What they stand for:
<a href="#features">read for yourself</a>.</p>
</header>
{_tiles(result)}
<section class="charts">
{figures}
</section>
{_features(result)}
{_footer(result)}
</main>
</body>
</html>
"""


def _learning(result: Result) -> Panel:
    steps, fvu = ([line[name] for line in result.log] for name in ("step", "fvu"))
    caption = (
        "Fraction of the variance that the reconstruction leaves unexplained (FVU), lower is better. Line "
        "and band: mean and range over the training batches."
    )
    if result.held_out:
        caption += " Dashed: text never trained on."
    return Panel("Learning", fvu_curve(steps, fvu, result.held_out and result.held_out.fvu), caption)


def _density(result: Result) -> Panel:
    return Panel(
        "Density",
        density_histogram(result.counts, result.tokens),
        "Latents by how often they fire, over all of the text. A good dictionary is made of rare, specific "
        "latents; one that never fires is wasted.",
    )


def _tiles(result: Result) -> str:
    best, seen = result.best, ""
    if result.held_out:
        seen = " never trained on"
        if result.training:
            seen += f", {result.training.fvu:.3f} on the training text"
    tiles = [
        (f"{1 - best.fvu:.1%}", "variance explained", f"FVU {best.fvu:.3f} on {best.tokens:,} tokens{seen}"),
        (f"{best.l0:.1f}", "latents a token (L0)", f"{best.l0 / result.num_latents:.2%} of all, on average"),
        (
            f"{result.dead:,}",
            "dead latents",
            f"{result.dead / result.num_latents:.1%} of {result.num_latents:,} never fire",
        ),
        *(panel.tile for panel in result.panels if panel.tile),
    ]
    if result.log:
        tiles.append((f"{result.seconds:,.0f} s", "of training", _trained(result)))
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
<p>Made by <code>fastsparse report</code>.</p>
</footer>"""
