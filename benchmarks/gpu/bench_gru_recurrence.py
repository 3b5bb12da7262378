"""``gru_recurrence``: see :mod:`benchmarks.gpu.recurrences`."""

from functools import partial

from benchmarks.gpu import recurrences
from benchmarks.recurrences import GRU

jobs = partial(recurrences.jobs, GRU)
