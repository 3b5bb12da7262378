"""The table of docs/ops.md, from the ops' records: ``python docs/ops.py`` writes it."""

from pathlib import Path

from fastsparse.ops._library import OPS

PAGE = Path(__file__).parent / "ops.md"
HEAD = """# Ops

What PyTorch's dispatcher knows, as `torch.ops.fastsparse.<op>`: the [functions](api.md) look at their
arguments and call these. A letter is one size wherever it stands in a line; S, the number of sequences, is B
where there are no `cu_seqlens`; what is marked `?` may be absent. Whoever calls an op by its name has its
tensors checked against the same line. Every op is defined in plain PyTorch under `fastsparse/reference/`,
which runs wherever there is no kernel.

| op | takes and returns | kernels | has a gradient |
|---|---|---|---|
"""


def page() -> str:
    rows = (
        f"| `{name}` | {'; or '.join(f'`{case}`' for case in op.form.text.split(' | '))} "
        f"| {', '.join(op.kernels) or 'none'} | {'yes' if op.differentiable else 'no'} |\n"
        for name, op in sorted(OPS.items())
    )
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page())
