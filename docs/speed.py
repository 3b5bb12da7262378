"""The README's chart, from the committed results: ``python docs/speed.py`` writes docs/speed.svg."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/cpu-amd-zen4-avx512-2core/sae_step-peers.json"
SVG = ROOT / "docs/speed.svg"
SHOWN = ("fastsparse", "sparsify", "SAELens, sparse activations", "torch", "dictionary_learning", "SAELens")
OURS = SHOWN[0]

STYLE = """
  .paper { fill: #fbfaf7; stroke: #e4e0d6 }
  text { font: 15px ui-sans-serif, system-ui, "Segoe UI", Roboto, Helvetica, sans-serif; fill: #1d1c1a }
  .head { font-size: 19px; font-weight: 650 } .soft { fill: #6a665e; font-size: 13px }
  .ours { fill: #1f6f78 } .other { fill: #b9b3a6 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #15161a; stroke: #32343c }
    text { fill: #e9e6df } .soft { fill: #9b978d } .ours { fill: #5fb9c0 } .other { fill: #565a66 }
  }
"""


def chart(result: dict) -> str:
    """Bars of the first case's medians, each with how many times as long as ours it takes."""
    case, origin = result["cases"][0], result["provenance"]
    seconds = {name: case["contenders"][name]["median"] for name in SHOWN}
    ratios = {name: ratio["of_medians"] for name, ratio in case["ratios"][OURS].items()}
    shape = " ".join(f"{key}={value}" for key, value in case["shape"].items())
    left, room, row = 250, 490, 34
    rows = []
    for number, (name, time) in enumerate(seconds.items()):
        y, width = 92 + row * number, room * time / max(seconds.values())
        kind, times = ("ours", "") if name == OURS else ("other", f", {ratios[name]:.1f} times as long")
        rows += [
            f'<text x="{left - 14}" y="{y + 16}" text-anchor="end">{name}</text>',
            f'<rect class="{kind}" x="{left}" y="{y}" width="{width:.1f}" height="22" rx="3"/>',
            f'<text class="soft" x="{left + width + 10:.1f}" y="{y + 16}">{time:.2f} s{times}</text>',
        ]
    height = 92 + row * len(seconds) + 20
    machine = f"{origin['cpu']}, {origin['threads']} threads, torch {origin['torch']}, {origin['date']}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 {height}" role="img">',
        "<title>Seconds for a training step of a TopK autoencoder</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="paper" x=".5" y=".5" width="959" height="{height - 1}" rx="12"/>',
        '<text class="head" x="32" y="44">A training step of a TopK autoencoder: forward and backward</text>',
        f'<text class="soft" x="32" y="68">{shape}, fp32; {machine}</text>',
        *rows,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    SVG.write_text(chart(json.loads(RESULT.read_text())), encoding="utf-8")
