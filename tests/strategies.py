"""Hypothesis strategies for tensors and codes, special values included."""

import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e30, -1e30, 1e-30, 1e-40, torch.nan, torch.inf, -torch.inf])
number = st.floats(-10, 10, width=32) | special


def tensors(shape, elements=number, dtype="float32"):
    """Tensors of a shape."""
    return arrays(dtype, shape, elements=elements).map(torch.from_numpy)


@st.composite
def codes(draw, elements=number):
    """A code and the sizes of what it multiplies: values (N, k), indices (N, k), M, D."""
    N, k, M, D = (draw(st.integers(low, high)) for low, high in ((0, 9), (0, 9), (1, 20), (0, 20)))
    indices = draw(tensors((N, k), st.integers(0, M - 1), "int64"))
    return draw(tensors((N, k), elements)), indices, M, D
