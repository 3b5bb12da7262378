"""The report's style sheet."""

STYLE = """
:root {
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d1c1a; --soft: #6a665e; --rule: #e4e0d6;
  --main: #1f6f78; --band: rgb(31 111 120 / .18); --other: #b9b3a6; --mark: #c2410c; --hot: 249 140 50;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15161a; --card: #1d1f25; --ink: #e9e6df; --soft: #9b978d; --rule: #32343c;
    --main: #5fb9c0; --band: rgb(95 185 192 / .2); --other: #565a66; --mark: #fb923c; --hot: 190 84 14;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font-family: ui-sans-serif, system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 3rem 1.25rem 2rem; }
h1 { font-size: clamp(1.7rem, 4.6vw, 2.9rem); line-height: 1.12; letter-spacing: -.02em; max-width: 22ch;
  margin: .2rem 0 1rem; text-wrap: balance; }
h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
a { color: var(--main); }
.eyebrow { color: var(--main); font-weight: 650; margin: 0; letter-spacing: .02em; }
.lede { max-width: 62ch; font-size: 1.08rem; margin: 0 0 2rem; }
.tiles { list-style: none; padding: 0; margin: 0 0 1rem; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); }
.tiles li { border-top: 3px solid var(--main); padding-top: .6rem; }
.tiles strong { display: block; font-size: 2rem; line-height: 1.1; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.tiles b { display: block; }
.tiles span { color: var(--soft); font-size: .86rem; display: block; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr));
  margin: 2rem 0 3rem; }
figure, article { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; margin: 0;
  padding: 1.1rem 1.2rem; min-width: 0; }
figure { display: flex; flex-direction: column; }
figcaption { color: var(--soft); font-size: .86rem; margin-top: auto; padding-top: .8rem; }
svg { width: 100%; height: auto; display: block; }
.tick { font-size: 12px; fill: var(--soft); }
.note { font-size: 13px; fill: var(--ink); }
.name { font-size: 13px; fill: var(--soft); }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke: var(--main); stroke-width: 2.2; stroke-linejoin: round; }
.band { fill: var(--band); }
.mark-line { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 5 4; }
.bar { fill: var(--main); }
.bar.dead { fill: var(--mark); }
.bar.other { fill: var(--other); }
.whisker { stroke: var(--ink); stroke-width: 1.5; }
.how { max-width: 78ch; color: var(--soft); margin: 0 0 1.4rem; }
.held { color: var(--main); border: 1px solid currentColor; border-radius: 4px; padding: 0 .3em;
  font-size: .78em; white-space: nowrap; }
.cards { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(32rem, 100%), 1fr)); }
h3 { margin: 0; font-size: 1.15rem; overflow-wrap: anywhere; }
.latent { color: var(--soft); font-weight: 400; font-size: .9rem; float: right; }
.words { list-style: none; margin: .3rem 0 .8rem; padding: 0; color: var(--soft); font-size: .82rem;
  display: flex; flex-wrap: wrap; gap: .2rem .9rem; }
.words code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  color: var(--ink); }
blockquote { margin: 0; padding: .55rem 0; border-top: 1px solid var(--rule); }
blockquote p { margin: 0; font-size: .93rem; overflow-wrap: anywhere; }
blockquote footer { color: var(--soft); font-size: .76rem; margin-top: .15rem; }
mark { color: inherit; background: rgb(var(--hot) / calc(var(--a) * .9)); border-radius: 3px;
  padding: .08em 0; }
mark.top { font-weight: 700; text-decoration: underline; text-underline-offset: .18em; }
summary { cursor: pointer; color: var(--main); font-size: .86rem; padding: .4rem 0;
  border-top: 1px solid var(--rule); }
.facts { color: var(--soft); font-size: .78rem; margin: .5rem 0 0; font-variant-numeric: tabular-nums; }
.page { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: 1.4rem; font-size: .88rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0 0 1rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media print { details > * { display: block; } article, figure { break-inside: avoid; } }
"""
