"""Triton's topk_encode where the op tests don't lead: many stripes, row blocks, the screen, large k."""

import pytest
import torch
from backends import missing, running
from oracle import assert_topk, integers, random
from test_topk_encode import DATA, assert_same_as_reference, overflowing_when_rounded

import fastsparse

BACKENDS = [name for name in ("triton-interpreted", "triton-gpu") if missing(name) is None]
M = 2100  # four stripes of 512 and a part
TOKENS = 70  # two row blocks of 32 and a part

if not BACKENDS:
    pytest.skip(f"Triton's kernels: {missing('triton-interpreted')}", allow_module_level=True)

from fastsparse.kernels import topk_encode as kernel  # noqa: E402


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    """Runs a test on Triton's kernels with limits so low that small shapes reach every path."""
    monkeypatch.setattr(kernel, "_MOST_TOKENS", 32)
    monkeypatch.setattr(kernel, "_MOST_SCREENED_TOKENS", 64)
    monkeypatch.setattr(kernel, "_LEAST_SCORES", 32 * 512)
    monkeypatch.setattr(kernel, "_MOST_SCORES", 32 * 512)
    with running(request.param):
        yield request.param


@pytest.fixture(params=[False, True], ids=["plain", "screened"])
def screening(request, monkeypatch):
    monkeypatch.setattr(kernel, "screening", request.param)
    return request.param


@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 33), (torch.bfloat16, 1)], ids=str)
def test_stripes_and_row_blocks(screening, dtype, k):
    x, weight, bias = (random(*size, seed=1, dtype=dtype) for size in ((TOKENS, 24), (M, 24), (M,)))
    code = fastsparse.topk_encode(x, weight, bias, k=k)
    assert_topk(code, x, weight, bias, k=k)


def test_options_over_stripes(screening):
    x, weight, bias = (random(*size, seed=1) for size in ((TOKENS, 24), (M, 24), (M,)))
    options = {"activation": "abs", "latent_scale": random(M, seed=2), "latent_mask": random(M, seed=3) > 0}
    code = fastsparse.topk_encode(x, weight, bias, k=9, **options)
    assert_topk(code, x, weight, bias, k=9, **options)


@pytest.mark.parametrize("eligible", [6, 500, 513, 1100])
@pytest.mark.parametrize("last", [False, True])
def test_stripes_behind_the_eligible_are_skipped(screening, eligible, last):
    mask = torch.arange(M) < eligible
    mask = mask.flip(0) if last else mask
    x, weight, bias = integers(40, 16, seed=1), integers(M, 16, seed=2), integers(M, seed=3)
    assert_same_as_reference(x, weight, bias, k=5, activation="none", latent_mask=mask)


@pytest.mark.parametrize("k", [5, 300])
@pytest.mark.parametrize("direction", [1, 0, -1])
def test_sorted_over_stripes(screening, direction, k):
    # Ascending, every latent beats the bound that the earlier ones set, and the lists fill; 0: all are tied.
    x, weight = integers(40, 1, seed=1, limit=1).abs() + 1, direction * torch.arange(M).float().unsqueeze(1)
    assert_same_as_reference(x, weight, k=k, activation="none")


def test_ties_over_stripes(screening):
    x, weight, bias = integers(TOKENS, 3, seed=1), integers(M, 3, seed=2), integers(M, seed=3)
    assert_same_as_reference(x, weight, bias, k=40, activation="abs")


def test_undecided_rows_are_done_again(monkeypatch):
    monkeypatch.setattr(kernel, "screening", True)
    redone = []
    plain = kernel._Encoder._plain

    def spy(encoder, rows, live):
        redone.append((rows[: int(live)].tolist(), len(rows)))
        plain(encoder, rows, live)

    monkeypatch.setattr(kernel._Encoder, "_plain", spy)
    # Scores differ by less than bf16 can tell; but of every third token by much.
    weight = torch.cat(
        (random(1, 12, seed=1) + 2.0**-14 * random(M, 12, seed=2), random(M, 12, seed=3)), dim=1
    )
    x = torch.cat((random(TOKENS, 12, seed=4), random(TOKENS, 12, seed=5)), dim=1)
    sharp = torch.arange(TOKENS) % 3 == 0
    x[:, :12].masked_fill_(sharp.unsqueeze(1), 0)
    x[:, 12:].masked_fill_(~sharp.unsqueeze(1), 0)
    code = fastsparse.topk_encode(x, weight, k=9)
    assert redone == [(torch.arange(TOKENS)[~sharp].tolist(), TOKENS)]
    assert_topk(code, x, weight, k=9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "weight", "bias"])
def test_non_finite_over_stripes(screening, where, bad):
    inputs = {"x": random(40, 16, seed=1), "weight": random(M, 16, seed=2), "bias": random(M, seed=3)}
    inputs[where][torch.arange(len(inputs[where])) % 13 == 5] = bad
    code = fastsparse.topk_encode(**inputs, k=9)
    assert_topk(code, **inputs, k=9)


@pytest.mark.parametrize("activation", ["relu", "abs"])
def test_large_k_is_sorted(monkeypatch, activation):
    monkeypatch.setattr(kernel, "_MOST_K", 8)
    monkeypatch.setattr(kernel, "_MOST_SCORES", 16 * 2560)  # 16 rows at a time
    x, weight, bias = integers(40, 3, seed=1), integers(M, 3, seed=2), integers(M, seed=3)
    mask = torch.arange(M) % 3 > 0
    for options in ({}, {"latent_scale": integers(M, seed=4)}, {"latent_mask": mask}):
        assert_same_as_reference(x, weight, bias, k=700, activation=activation, **options)
    x[7] = torch.nan
    assert fastsparse.topk_encode(x, weight, k=20).indices[7].tolist() == list(range(20))


@pytest.mark.parametrize("data", DATA)
def test_hostile_data_screened(monkeypatch, data):
    monkeypatch.setattr(kernel, "screening", True)
    x, weight, bias = DATA[data](random(20, 64, seed=1), random(M, 64, seed=2), random(M, seed=3))
    code = fastsparse.topk_encode(x, weight, bias, k=16, activation="abs")
    assert_topk(code, x, weight, bias, k=16, activation="abs")


@pytest.mark.parametrize("how", ["summed", "scaled"])
def test_keys_that_overflow_when_rounded(monkeypatch, how):
    monkeypatch.setattr(kernel, "screening", True)
    arguments, best = overflowing_when_rounded(how, 20, 64, M)
    assert (fastsparse.topk_encode(**arguments, k=16).indices == torch.tensor(best[:16])).all()
