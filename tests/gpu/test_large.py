"""More elements than 32 bits can count, in every operand that may have them; a sample of rows is checked."""

import pytest
import torch
from oracle import assert_pursuit, assert_topk
from recurrences import GRU, assert_states
from test_sparse_products import SDDMM, SPMM, SPMM_T

import fastsparse
from fastsparse import reference

OVER = 2**31


@pytest.fixture
def room(cuda):
    """Skips a test that needs more memory than is free."""

    def require(gib: float) -> torch.device:
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gib:
            pytest.skip(f"needs {gib} GiB of GPU memory, {free:.1f} GiB are free")
        return cuda

    yield require
    torch.cuda.empty_cache()


def normal(device, *shape, dtype=torch.bfloat16):
    generator = torch.Generator(device).manual_seed(len(shape) + shape[0])
    return torch.randn(*shape, device=device, generator=generator, dtype=dtype)


def sample(N: int) -> torch.Tensor:
    """Rows at both ends and between."""
    return torch.linspace(0, N - 1, 7).round().long()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_encode_where_tokens_times_latents_is_large(room, backend, dtype):
    device = room(12)
    N, D, M, k = 66_000, 48, 33_000, 5
    assert N * M > OVER
    x, weight = normal(device, N, D, dtype=dtype), normal(device, M, D, dtype=dtype)
    values, indices = fastsparse.topk_encode(x, weight, k=k)
    rows = sample(N)
    code = values[rows].cpu(), indices[rows].cpu()
    assert_topk(code, x[rows].cpu(), weight.cpu(), k=k)


def test_encode_where_the_weight_is_large(room, backend):
    device = room(24)
    N, D, M, k = 33, 1032, 2_090_000, 5
    assert M * D > OVER
    weight, x = normal(device, M, D), normal(device, N, D)
    # Five latents whose scores are known and far above the others'; the last lie beyond what 32 bits address.
    planted = torch.tensor([0, 1, M // 2, M - 2, M - 1], device=device)
    weight[planted] = 0
    weight[planted, 0] = torch.arange(1.0, 6.0, device=device).to(weight.dtype) * 100
    x[:, 0] = 8
    values, indices = fastsparse.topk_encode(x, weight, k=k)
    assert (indices == planted.flip(0)).all()
    assert (values == torch.tensor([4000.0, 3200, 2400, 1600, 800], device=device)).all()


def test_pursuit_where_the_gram_matrix_is_large(room, backend):
    device = room(16)
    N, D, M, k = 9, 16, 50_000, 4
    assert M * M > OVER
    x, dictionary = (normal(device, *shape, dtype=torch.float32) for shape in ((N, D), (M, D)))
    pursuit = fastsparse.matching_pursuit(x, dictionary, k=k, method="gram")
    assert_pursuit(tuple(part.cpu() for part in pursuit), x.cpu(), dictionary.cpu(), k=k)


def test_sparse_products_where_the_weight_is_large(room, backend):
    device = room(24)
    N, D, M, k = 40, 1032, 2_090_000, 6
    weight, values = normal(device, M, D), normal(device, N, k)
    indices = torch.randint(M - 5000, M, (N, k), device=device)
    indices[:, 0] = 0
    kept, local = indices.unique(return_inverse=True)
    small = weight[kept].cpu()
    SPMM.check(SPMM(values, indices, weight).cpu(), values.cpu(), local.cpu(), small)
    x = normal(device, N, D)
    SDDMM.check(SDDMM(x, weight, indices).cpu(), x.cpu(), small, local.cpu())
    del weight
    out = SPMM_T(values, indices, x, M)
    assert out.numel() > OVER
    SPMM_T.check(out[kept].cpu(), values.cpu(), local.cpu(), x.cpu(), len(kept))
    out[kept] = 0
    assert not out.any()


def test_sparse_products_where_the_tokens_are_large(room, backend):
    device = room(24)
    N, D, M, k = 1_050_000, 2056, 300, 2
    assert N * D > OVER
    weight, values = normal(device, M, D), normal(device, N, k)
    indices = torch.randint(0, M, (N, k), device=device)
    out = SPMM(values, indices, weight)
    rows = sample(N).to(device)
    SPMM.check(out[rows].cpu(), values[rows].cpu(), indices[rows].cpu(), weight.cpu())
    scores = SDDMM(out, weight, indices)
    SDDMM.check(scores[rows].cpu(), out[rows].cpu(), weight.cpu(), indices[rows].cpu())
    # One latent's list alone: its tokens are spread over all of x.
    values[:, 1] = 0
    total = SPMM_T(values, indices, out, M)[7].double()
    mine = (indices[:, 0] == 7).nonzero()[:, 0]
    exact, magnitude = torch.zeros(2, D, dtype=torch.float64, device=device)
    for part in mine.split(1024):
        terms = values[part, :1].double() * out[part].double()
        exact += terms.sum(0)
        magnitude += terms.abs().sum(0)
    assert ((total - exact).abs() <= 2**-8 * exact.abs() + len(mine) * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("solver", ["sequential", "newton", "shooting"])
def test_recurrences_where_the_states_are_large(room, backend, solver):
    device = room(64)
    T, H = 720_000, 3000
    assert T * H > OVER
    weight = normal(device, 3, H, dtype=torch.float32)
    u = normal(device, 1, T, 3, H, dtype=torch.float32)
    h = fastsparse.gru_recurrence(u, weight, solver=solver)
    for t in (0, T // 2, T - 40):
        before = h[:, t - 1] if t else torch.zeros(1, H, device=device)
        steps, states, start = (part.cpu() for part in (u[:, t : t + 40], h[:, t : t + 40], before))
        assert_states(GRU, (states.contiguous(),), steps, (weight.cpu(),), (start,))


def test_gradients_of_recurrences_where_the_states_are_large(room, backend):
    """Upstream is zero but at both ends and in the middle, so that all of a sum is known."""
    device = room(56)
    T, H = 720_000, 3000
    assert T * H > OVER
    weight, start = normal(device, 3, H).mul_(0.3), normal(device, 1, H)
    u, d_h = normal(device, 1, T, 3, H), torch.zeros(1, T, H, device=device, dtype=torch.bfloat16)
    h = fastsparse.gru_recurrence(u, weight, start, solver="sequential")
    ends = 40, T // 2, T
    for end in ends:
        d_h[:, end - 40 : end] = normal(device, 1, 40, H)
    backward = torch.ops.fastsparse.gru_recurrence_backward.default
    d_u, d_weight, d_start = backward(u, weight, start, None, h, d_h, True, True, True)
    total = torch.zeros(3, H)
    for end in ends:  # what a state still owes to the one 160 steps before is nothing
        first = max(0, end - 200)
        before = h[:, first - 1] if first else start
        parts = [part.float().cpu() for part in (u[:, first:end], weight, before)]
        states = [part[:, first:end].float().cpu() for part in (h, d_h)]
        right = reference.gru_recurrence_backward(*parts, None, *states, True, True, True)
        torch.testing.assert_close(d_u[:, first:end].float().cpu(), right[0], rtol=2**-7, atol=1e-3)
        total += right[1]
        if first == 0:
            torch.testing.assert_close(d_start.float().cpu(), right[2], rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(d_weight.float().cpu(), total, rtol=2**-7, atol=1e-2)
    assert not d_u[:, ends[0] : ends[1] - 4000].any()


@pytest.mark.parametrize("reverse", [False, True])
def test_linear_recurrences_where_the_states_are_large(room, backend, reverse):
    device = room(40)
    T, H = 720_000, 3000
    assert T * H > OVER
    a, b = normal(device, 1, T, H).mul_(0.3), normal(device, 1, T, H)
    h = fastsparse.linear_recurrence(a, b, reverse=reverse)
    for t in (0, T // 2, T - 40):  # a state that is forgotten within these steps
        first, last = max(0, t - 40), min(T, t + 80)
        part = (tensor[:, first:last].float().cpu() for tensor in (a, b))
        right = reference.linear_recurrence(*part, reverse=reverse)[:, t - first : t - first + 40]
        torch.testing.assert_close(h[:, t : t + 40].float().cpu(), right, rtol=2**-7, atol=1e-3)
