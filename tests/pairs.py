"""Which cases of a test to run: few that between them try every pair of its parameters' values.

Nearly all faults are of one parameter or of two together (Kuhn, Wallace, Gallo, "Software fault interactions
and implications for software testing", 2004), so that the full product of four adds time and finds nothing.
"""

import heapq
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

FEW = 8  # cases of which none are left out


def covering(cases: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Positions of cases that have every pair of values that any case has; the first ones of equals.

    Greedy: the case with the most pairs that are still missing is taken next.

    Example:
        >>> covering([{"a": a, "b": b, "c": c} for a in "xy" for b in "xy" for c in "xy"])
        [0, 3, 5, 6]
    """
    pairs = [set(combinations(sorted(case.items(), key=lambda item: item[0]), 2)) for case in cases]
    missing = set().union(*pairs)
    heap = [(-len(its), position) for position, its in enumerate(pairs)]  # which is in order
    taken = []
    while missing:
        most, position = heapq.heappop(heap)
        gain = len(pairs[position] & missing)
        if gain == -most:
            taken.append(position)
            missing -= pairs[position]
        elif gain:
            heapq.heappush(heap, (-gain, position))
    return sorted(taken)


def of_items(items: Sequence) -> tuple[list, list]:
    """pytest's items in two: those to run, and the others. A test of one parameter keeps all its cases."""
    tests: dict[str, list[int]] = {}
    for position, item in enumerate(items):
        tests.setdefault(item.nodeid.split("[")[0], []).append(position)
    kept = set()
    for positions in tests.values():
        if len(positions) > FEW and len(items[positions[0]].callspec.params) > 1:
            chosen = covering([_values(items[position]) for position in positions])
            positions = [positions[place] for place in chosen]
        kept.update(positions)
    chosen = [item for position, item in enumerate(items) if position in kept]
    return chosen, [item for position, item in enumerate(items) if position not in kept]


def _values(item) -> dict[str, Hashable]:
    """What distinguishes a case from others of its test: the numbers of a tuple count one by one."""
    values = {}
    for name, value in item.callspec.params.items():
        if isinstance(value, tuple) and all(isinstance(part, int) for part in value):
            values |= {f"{name}[{place}]": part for place, part in enumerate(value)}
        else:
            values[name] = repr(value) if isinstance(value, (str, int, float)) else id(value)
    return values
