import pytest
import torch
from autoencoders import D, tokens

from fastsparse.nn import fvu


def test_fvu() -> None:
    target = tokens(50, D, dtype=torch.float64) + 100
    assert fvu(target, target) == 0
    torch.testing.assert_close(fvu(target.mean(0).expand(50, D), target).item(), 1.0)
    half = target.bfloat16()
    assert fvu(half + 1, half).dtype == torch.float32
    with pytest.raises(
        ValueError, match=r"estimate must have the shape of target \(50, 12\), got \(49, 12\)"
    ):
        fvu(target[1:], target)
    with pytest.raises(ValueError, match=r"at least one token.*\(0, 12\)"):
        fvu(target[:0], target[:0])
