"""Which of our two backends should run what: every op on both, over a grid of shapes, nobody else.

Of the gated recurrences each with every solver.
"""

from collections.abc import Iterator
from functools import partial

from benchmarks.gpu import (
    bench_linear_recurrence,
    bench_sddmm,
    bench_sparse_decode,
    bench_spmm_t,
    bench_topk_encode,
    recurrences,
)
from benchmarks.gpu.lab import Job, Lab
from benchmarks.recurrences import GRU, LSTM
from benchmarks.shapes import Sequences, Shape

TOKENS = (8192, 64, 1024)
MODELS = ((768, 32768, 32), (4096, 131072, 64), (768, 16384, 100), (2304, 65536, 100))
SEQUENCES = ((8, 2048, 1024), (1, 32768, 64), (1, 2048, 1024), (8, 8192, 64), (32, 512, 4096), (1, 512, 64))


def jobs(lab: Lab, ceilings: dict[str, float]) -> Iterator[Job]:
    cases = {
        "topk_encode": partial(bench_topk_encode.case, lab),
        "spmm": partial(bench_sparse_decode.forward, lab, ceilings),
        "sddmm": partial(bench_sddmm.case, lab, ceilings),
        "spmm_t": partial(bench_spmm_t.case, lab, ceilings),
    }
    grid = [Shape("grid", N, D, M, k) for N in TOKENS for D, M, k in MODELS]
    for priority, shape in enumerate(grid):
        for dtype in ("bf16", "fp32"):
            for op, case in cases.items():
                name = f"{op}, {dtype}, {shape}"
                yield Job(priority, "choice", name, partial(case, name, shape, "gaussian", dtype, alone=True))
    recurrent = {
        "linear_recurrence": partial(bench_linear_recurrence.case, lab, ceilings),
        "gru_recurrence": partial(recurrences.forward, GRU, lab, ceilings),
        "lstm_recurrence": partial(recurrences.forward, LSTM, lab, ceilings),
    }
    for priority, (B, T, H) in enumerate(SEQUENCES):
        shape = Sequences("grid", B, T, H)
        for dtype in ("fp32", "bf16"):
            for op, case in recurrent.items():
                name = f"{op}, {dtype}, {shape}"
                yield Job(priority, "choice", name, partial(case, name, shape, dtype, alone=True))
