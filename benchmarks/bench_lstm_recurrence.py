"""``lstm_recurrence``: see :mod:`benchmarks.gated_recurrences`."""

from functools import partial

from benchmarks import gated_recurrences
from benchmarks.recurrences import LSTM

run = partial(gated_recurrences.run, LSTM)
