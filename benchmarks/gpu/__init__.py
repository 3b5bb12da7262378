"""The measurements on a GPU: ``python -m benchmarks.gpu --help``.

``__main__`` keeps the time and writes the results; ``worker``, a process of its own that may die, measures;
``lab`` is what it measures with, ``ceilings`` what the device could do; one ``bench_*`` module an op;
``baselines`` and ``atomics`` are what others run, ``choice`` says which of our two backends should run what.
"""
