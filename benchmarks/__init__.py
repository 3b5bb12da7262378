"""Measurements of every op beside what people use today: ``python -m benchmarks --help``.

``lab`` is what is measured with, on a CPU or a GPU, ``harness`` times contenders, ``checks`` decides who may
be timed, ``ceilings`` says what a device could do, ``shapes`` and ``data`` what is measured, ``bars`` what
must be reached; one ``bench_*`` module an op or a family, one ``peers`` module a peer; ``baselines`` and
``atomics`` restate what others run on GPUs. ``worker`` measures, ``__main__`` keeps the time and the results,
``choice`` says which of our two backends should run what on a GPU.
"""
