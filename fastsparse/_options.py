"""What ops are told by name. Below a schema a name is its position here (csrc/options.h).

PyTorch's stable ABI loses the memory of every string that it hands to a kernel (pytorch/pytorch#191340).
"""

from collections.abc import Sequence

ACTIVATIONS = ("relu", "none", "abs")
METHODS = ("auto", "direct", "gram")
SOLVERS = ("auto", "sequential", "newton", "shooting")

# When the solvers of gated recurrences stop, and what they certify (csrc/solvers.h; reference/_solvers.py).
NEWTON_PASSES, SHOOTING_PASSES = 12, 8  # at most
SMALL = 32  # what a state may be off by, in eps, beside it or 1
MOST_SPREAD = 2**12  # the variance of rounding errors, in units of one's


def position_of(op: str, name: str, choice: str, options: Sequence[str]) -> int:
    """Where a choice stands among the options.

    Raises:
        ValueError: it is none of them.
    """
    if choice not in options:
        raise ValueError(f"{op}: {name} must be one of {', '.join(options)}, got {choice!r}")
    return options.index(choice)


def option_at(op: str, name: str, position: int, options: Sequence[str]) -> str:
    """The option at a position, as ops take it.

    Raises:
        ValueError: there is none.
    """
    if not 0 <= position < len(options):
        raise ValueError(f"{op}: {name} must be in [0, {len(options)}), got {position}")
    return options[position]
