"""What BatchTopKSAE alone does: how many entries a batch gets, and the threshold that evaluation goes by."""

from functools import partial

import autoencoders
import pytest
import torch
from autoencoders import D, M, tokens

import fastsparse
from fastsparse.nn import BatchTopKSAE

make = partial(autoencoders.make, BatchTopKSAE)


@pytest.mark.parametrize(
    ("k", "N", "total"), [(0.29, 100, 29), (2.5, 3, 7), (M, 4, 4 * M), (0.1, 9, 0), (3, 0, 0)]
)
def test_a_batch_has_the_whole_part_of_k_each(k: float, N: int, total: int) -> None:
    sae, x = make(k=k), tokens(N, D)
    code = sae.encode(x)
    assert isinstance(code, fastsparse.BatchTopK)
    assert len(code.values) == code.offsets[-1] == total
    assert sae(x).shape == x.shape


def test_evaluation_goes_by_the_threshold() -> None:
    sae, x = make(), tokens(64, D)
    with pytest.raises(
        RuntimeError, match=r"^BatchTopKSAE: threshold must be known in evaluation mode, got 0"
    ):
        sae.eval().encode(x)
    out = sae.train().loss(x)
    assert sae.threshold == 0, "loss changes nothing"
    sae.count_firings_(out.code)
    assert sae.threshold == out.code.threshold
    code = sae.eval().encode(x)
    assert isinstance(code, fastsparse.Ragged)
    assert len(code.values) == len(out.code.values) - 1, "all but the least, which isn't above itself"
    one = sae.encode(x[3])
    torch.testing.assert_close(one.to_dense(M)[0], code.to_dense(M)[3])


def test_the_threshold_is_a_moving_average_of_positive_ones() -> None:
    sae = make(threshold_decay=0.75)
    code = sae.encode(tokens(8, D))
    for threshold, average in ((2.0, 2.0), (4.0, 2.5), (-1.0, 2.5), (0.0, 2.5)):
        sae.count_firings_(code._replace(threshold=torch.tensor(threshold)))
        assert sae.threshold == average
    sae.eval().count_firings_(sae.encode(tokens(8, D)))
    assert sae.threshold == 2.5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, ValueError, r"k must be above 0 and at most num_latents \(40\), got k=0"),
        ({"k": 41}, ValueError, r"k must be above 0 and at most num_latents \(40\), got k=41"),
        ({"k": float("nan")}, ValueError, "k must be above 0 .*, got k=nan"),
        ({"k": "2"}, TypeError, "k must be a number, got '2' of type str"),
        ({"k": True}, TypeError, "k must be a number, got True of type bool"),
        ({"threshold_decay": -0.1}, ValueError, "threshold_decay must be finite .*=-0.1"),
    ],
)
def test_bad_averages_are_refused(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^BatchTopKSAE: {message}"):
        make(**options)
