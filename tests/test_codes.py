"""Codes as other layouts: what stands where, gradients, refusals, and what PyTorch sees of it."""

import pytest
import torch
from oracle import DTYPES, integers, random
from torch import Tensor

import fastsparse
from fastsparse import Ragged, TopK

M = 9
FORMS = ("to_dense", "to_sparse_coo", "to_sparse_csr")
every_form = pytest.mark.parametrize("form", FORMS)
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")


def ragged(dtype: torch.dtype = torch.float32, padding: int = 0) -> Ragged:
    """Rows of 5, 0, 1, 6 entries, in no order, latents repeated, and padding."""
    indices = torch.tensor([3, 1, 3, 8, 3, 0, 7, 7, 2, 2, 7, 0] + [0] * padding)
    values = torch.cat([integers(12, seed=1, dtype=dtype), torch.zeros(padding, dtype=dtype)])
    return Ragged(values, indices, torch.tensor([0, 5, 5, 6, 12]))


def topk(*leading: int, dtype: torch.dtype = torch.float32) -> TopK:
    indices = torch.arange(torch.Size(leading).numel() * 4).reshape(*leading, 4) * 5 % M
    indices[..., 3] = indices[..., 0]
    return TopK(random(*leading, 4, seed=2, dtype=dtype), indices)


def by_loop(code: Ragged) -> Tensor:
    dense = torch.zeros(len(code.offsets) - 1, M, dtype=code.values.dtype)
    for n in range(len(dense)):
        for e in range(int(code.offsets[n]), int(code.offsets[n + 1])):
            dense[n, code.indices[e]] += code.values[e]
    return dense


def strided(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


@every_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [0, 3])
def test_every_entry_is_at_its_place(form, dtype, padding):
    code = ragged(dtype, padding)
    out = getattr(code, form)(M)
    assert out.dtype == dtype
    assert torch.equal(strided(out), by_loop(code))
    if form != "to_dense":
        distinct = {(n, m) for n, m in zip(code.rows().tolist(), code.indices.tolist(), strict=True) if n < 4}
        assert out._nnz() == len(distinct)  # that a sum is 0 makes no difference
    if form == "to_sparse_coo":
        assert out.is_coalesced()
        assert out.indices().T.tolist() == sorted(map(list, distinct))
    if form == "to_sparse_csr":
        torch.sparse_csr_tensor(
            out.crow_indices(), out.col_indices(), out.values(), out.shape, check_invariants=True
        )


@every_form
@pytest.mark.parametrize("leading", [(5,), (2, 3), (), (0,), (2, 0)])
def test_leading_dimensions_of_topk(form, leading):
    code = topk(*leading)
    out = getattr(code, form)(M)
    right = code.values.new_zeros(*leading, M).scatter_add(-1, code.indices, code.values)
    assert out.shape == (right.shape if form == "to_dense" else (right.shape[:-1].numel(), M))
    torch.testing.assert_close(strided(out).reshape(right.shape), right)


def test_topk_as_rows():
    code = Ragged.from_topk(topk(2, 3))
    rows = code.indices.unflatten(0, (6, 4))
    assert torch.equal(rows, rows.sort(dim=1).values)
    assert torch.equal(code.offsets, torch.arange(7) * 4)
    assert code.row_counts().tolist() == topk(2, 3).row_counts().flatten().tolist() == [4] * 6


def test_padded():
    code = ragged(padding=2)
    padded = code.to_padded(7)
    assert code.row_counts().tolist() == [5, 0, 1, 6]
    for n, count in enumerate(code.row_counts().tolist()):
        its = slice(int(code.offsets[n]), int(code.offsets[n + 1]))
        for row, entries in zip(
            (padded.values[n], padded.indices[n]), (code.values, code.indices), strict=True
        ):
            assert torch.equal(row[:count], entries[its])
            assert not row[count:].any()
    assert torch.equal(padded.to_dense(M), code.to_dense(M))
    assert torch.equal(topk(2, 3).to_padded(9).to_dense(M), topk(2, 3).to_dense(M))
    assert code.to_padded(6).values.shape == (4, 6)


def test_nothing():
    nothing = Ragged(torch.zeros(0), torch.zeros(0).long(), torch.zeros(1).long())
    for form in FORMS:
        for columns in (0, 3):
            assert getattr(nothing, form)(columns).shape == (0, columns)
            assert getattr(nothing._replace(offsets=torch.zeros(3).long()), form)(columns).shape == (
                2,
                columns,
            )
    assert nothing.to_padded(0).values.shape == (0, 0)


@every_form
def test_gradients_reach_the_values(form):
    for code in (ragged(torch.float64, padding=2), topk(2, 3, dtype=torch.float64)):
        values = code.values.clone().requires_grad_()

        def run(values, code=code):
            return strided(getattr(code._replace(values=values), form)(M))

        assert torch.autograd.gradcheck(run, values)
        if form == "to_dense":
            assert torch.autograd.gradgradcheck(lambda values, run=run: run(values).square(), values)
    padded = ragged().values.requires_grad_()
    ragged()._replace(values=padded).to_padded(6).values.sum().backward()
    assert torch.equal(padded.grad, torch.ones(12))


def test_what_a_batch_kept():
    x, weight = random(6, 4, seed=1), random(M, 4, seed=2)
    code = fastsparse.batch_topk_encode(x, weight, total=11)
    scores = torch.relu(x @ weight.T)
    kept = scores.where(scores >= code.threshold, 0)
    torch.testing.assert_close(code.code.to_dense(M), kept)


@every_form
@pytest.mark.parametrize("make", [ragged, lambda: topk(3)], ids=["ragged", "topk"])
def test_refusals(form, make):
    code = make()
    with pytest.raises(IndexError, match=rf"^{form}: indices\[.*\] must be in \[0, 5\), got [5-8]$"):
        getattr(code, form)(5)
    with pytest.raises(ValueError, match=rf"^{form}: num_latents must be at least 0, got num_latents=-1$"):
        getattr(code, form)(-1)
    with pytest.raises(TypeError, match=rf"^{form}: num_latents must be an int"):
        getattr(code, form)(9.0)
    longest = int(code.row_counts().max())
    with pytest.raises(ValueError, match=rf"^to_padded: k must be .* longest row \({longest}\), got k=3$"):
        code.to_padded(3)


@pytest.mark.filterwarnings("ignore:.*(searchsorted|index_put).*:UserWarning")
def test_pytorch_sees_through_codes():
    code, batch = ragged(), torch.stack([ragged().values, random(12, seed=5)])
    together = torch.vmap(lambda values: code._replace(values=values).to_dense(M))(batch)
    torch.testing.assert_close(together, torch.stack([code._replace(values=v).to_dense(M) for v in batch]))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda code: (code.to_dense(M), code.to_padded(5)), fullgraph=True, backend="aot_eager"
    )
    dense, padded = compiled(code)
    assert torch.equal(dense, code.to_dense(M))
    assert padded.values.isnan().any(dim=1).tolist() == [False, False, False, True]  # where nothing is raised
