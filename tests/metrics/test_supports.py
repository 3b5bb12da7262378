"""Sets of latents as bits, against dense masks."""

import pytest
import torch
from oracle import random

from fastsparse import TopK, topk_encode
from fastsparse.metrics import hamming, redundancy, support_bits


def masks(code: TopK, M: int) -> torch.Tensor:
    return code.to_dense(M) != 0


@pytest.mark.parametrize("M", [1, 7, 8, 9, 64, 1001])
def test_bits_and_distances(M):
    code = topk_encode(random(50, 6, seed=1), random(M, 6, seed=2), k=min(5, M))  # some values are 0
    bits, dense = support_bits(code, M), masks(code, M)
    assert bits.shape == (50, -(-M // 8))
    unpacked = (bits.unsqueeze(-1) >> torch.arange(8)).bitwise_and(1).flatten(1).bool()
    assert torch.equal(unpacked[:, :M], dense)
    assert not unpacked[:, M:].any()
    expected = (dense.unsqueeze(1) ^ dense[:20]).sum(dim=-1)
    assert torch.equal(hamming(bits, bits[:20]), expected)


def test_many_pairs_are_compared_in_parts(monkeypatch):
    from fastsparse.metrics import supports

    bits = torch.randint(256, (30, 3), dtype=torch.uint8)
    whole = hamming(bits, bits)
    monkeypatch.setattr(supports, "_PAIRS", 200)
    assert torch.equal(hamming(bits, bits), whole)


def test_redundancy():
    indices = torch.tensor([[0, 1], [1, 0], [0, 2], [0, 1]])
    assert redundancy(TopK(torch.ones(4, 2), indices), 3) == 0.5
    values = torch.ones(4, 2)
    values[3, 1] = 0  # {0} is another set than {0, 1}
    assert redundancy(TopK(values, indices), 3) == 0.25
    assert support_bits(TopK(torch.ones(1, 3), torch.tensor([[4, 4, 4]])), 8).tolist() == [[16]]


def test_refused():
    with pytest.raises(ValueError, match="at least one token"):
        redundancy(TopK(torch.ones(0, 2), torch.zeros(0, 2, dtype=torch.int64)), 3)
    with pytest.raises(TypeError, match="b must be uint8 of one width"):
        hamming(torch.zeros(1, 2, dtype=torch.uint8), torch.zeros(1, 3, dtype=torch.uint8))
    with pytest.raises(IndexError):
        support_bits(TopK(torch.ones(1, 1), torch.tensor([[3]])), 3)
