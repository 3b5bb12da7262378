"""What is measured of codes, from their entries, without the (N, M) matrix of them."""

from fastsparse.metrics.concepts import (
    Histograms,
    attenuate,
    concept_histograms,
    concept_posterior,
    concept_separability,
)
from fastsparse.metrics.factors import Compositionality, compositionality
from fastsparse.metrics.supports import hamming, redundancy, support_bits
from fastsparse.metrics.totals import Measures, Totals, density_histogram, effective_features, evaluate

__all__ = [
    "Compositionality",
    "Histograms",
    "Measures",
    "Totals",
    "attenuate",
    "compositionality",
    "concept_histograms",
    "concept_posterior",
    "concept_separability",
    "density_histogram",
    "effective_features",
    "evaluate",
    "hamming",
    "redundancy",
    "support_bits",
]
