"""What can be said of a dictionary before it is used: how alike its atoms are, and which codes are unique.

Source: Song et al. 2025, arXiv 2509.20784 (the atomic inner product); Donoho and Elad 2003, "Optimally sparse
representation in general (nonorthogonal) dictionaries" (uniqueness); Elad 2010, "Sparse and Redundant
Representations", section 5.2 (coherence and restricted isometry).
"""

from fastsparse.diagnostics.coherence import (
    Coherence,
    RestrictedIsometry,
    coherence,
    largest_unique_support,
    restricted_isometry,
    uniqueness_fraction,
)
from fastsparse.diagnostics.metric import atomic_cosine, atomic_metric

__all__ = [
    "Coherence",
    "RestrictedIsometry",
    "atomic_cosine",
    "atomic_metric",
    "coherence",
    "largest_unique_support",
    "restricted_isometry",
    "uniqueness_fraction",
]
