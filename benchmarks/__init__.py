"""Measurements of every op beside what people use today: ``python -m benchmarks --help``.

``harness`` times contenders, ``checks`` decides who may be timed, ``ceilings`` says what this machine could
do, ``shapes`` and ``data`` what is measured, ``bars`` what must be reached; one ``bench_*`` module an op, one
``peers`` module a peer.
"""
