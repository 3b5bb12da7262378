"""What the op tests hold an answer against: the same sums in fp64, with a rigorous bound on fp32's rounding.

A sum of n products in precision u, in any order, fused or not, is off by at most gamma_n sum |a b| with
gamma_n = n u / (1 - n u) (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1), plus half
the least subnormal for every product that underflows. No tolerance in the op tests is looser than that.
"""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "transposed", "strided", "misaligned")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A 1-D or 2-D tensor's values in another memory layout; memory between its elements holds poison."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "transposed":
        return tensor.T.contiguous().T
    poison = float("nan") if tensor.is_floating_point() else -(2**62)
    if layout == "strided":
        store = tensor.new_full([2 * size + 3 for size in tensor.shape], poison)
        view = store[tuple(slice(1, 1 + 2 * size, 2) for size in tensor.shape)]
    else:  # misaligned: one element off every vector boundary
        view = tensor.new_full((tensor.numel() + 2,), poison)[1:-1].view(tensor.shape)
    return view.copy_(tensor)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Gaussian values from a seed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def integers(*shape: int, seed: int, limit: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers: sums of their products are exact in fp32, and full of ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, shape, generator=generator).to(dtype)


def random_indices(N: int, k: int, M: int, *, seed: int, distinct: bool = True) -> Tensor:
    """(N, k) latent indices below M, distinct in each row unless told otherwise."""
    generator = torch.Generator().manual_seed(seed)
    if distinct:
        return torch.rand(N, M, generator=generator).argsort(dim=1)[:, :k].contiguous()
    return torch.randint(0, M, (N, k), generator=generator)


def sum_error(terms: Tensor | int, magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a sum of ``terms`` products may be from the exact one, ``magnitude`` being the sum of |a b|.

    Infinite where a partial sum may overflow, since the order of the terms is the kernel's own business.
    """
    double = dtype == torch.float64
    info = torch.finfo(torch.float64 if double else torch.float32)
    terms = terms + 2  # an addend, and the product with a scale
    unit = terms * info.eps / 2
    gamma = unit / (1 - unit) * (2 if double else 1)  # in fp64 the exact sum is itself rounded
    error = gamma * magnitude + terms * info.smallest_normal * info.eps
    return torch.where(magnitude * (1 + gamma) < info.max, error, torch.inf)


def finite(tensor: Tensor) -> Tensor:
    """|tensor| in fp64 with what isn't finite as 0."""
    return tensor.double().abs().nan_to_num(0.0, 0.0, 0.0)


def assert_within(actual: Tensor, exact: Tensor, error: Tensor) -> None:
    """``actual`` is ``exact`` to within ``error``, then rounded to its dtype. Infinite error: all goes."""
    assert actual.shape == exact.shape
    exact, got = exact.double(), actual.double()
    slack = torch.where(exact.isfinite(), error, 0.0)
    # Rounding is monotone, so rounding the ends of the interval bounds every rounded member of it.
    low, high = (exact - slack).to(actual.dtype).double(), (exact + slack).to(actual.dtype).double()
    fine = ((got >= low) & (got <= high)) | (exact.isnan() & got.isnan()) | error.isinf()
    if not fine.all():
        worst = tuple(torch.nonzero(~fine)[0].tolist())
        raise AssertionError(
            f"{int((~fine).sum())} of {fine.numel()} elements are wrong; at {worst}: "
            f"got {got[worst].item()!r}, exactly {exact[worst].item()!r} +- {error[worst].item():.3g}"
        )


def assert_spmm(
    out: Tensor, values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None
) -> None:
    """``out`` is the code times the matrix (plus bias) up to fp32 rounding, NaN and infinities included."""
    atoms = weight.double()[indices]
    exact = (values.double().unsqueeze(-1) * atoms).sum(1)
    magnitude = (finite(values).unsqueeze(-1) * finite(atoms)).sum(1)
    error = sum_error(values.shape[1], magnitude, weight.dtype)
    if bias is not None:  # the sum is rounded to the output's dtype before the bias is added
        unit = torch.finfo(weight.dtype).eps / 2
        error = error + 4 * unit * (magnitude + finite(bias)) + 4 * torch.finfo(weight.dtype).tiny
        exact = exact + bias.double()
    assert out.dtype == weight.dtype
    assert_within(out, exact, error)


def assert_sddmm(out: Tensor, x: Tensor, weight: Tensor, indices: Tensor) -> None:
    """``out`` is ``x @ weight.T`` at the indices up to fp32 rounding."""
    atoms = weight.double()[indices]
    exact = (x.double().unsqueeze(1) * atoms).sum(-1)
    magnitude = (finite(x).unsqueeze(1) * finite(atoms)).sum(-1)
    assert out.dtype == x.dtype
    assert_within(out, exact, sum_error(x.shape[1], magnitude, x.dtype))


def assert_spmm_t(out: Tensor, values: Tensor, indices: Tensor, x: Tensor, num_latents: int) -> None:
    """``out`` is the transposed code times ``x`` up to fp32 rounding."""
    N, k = indices.shape
    D = x.shape[1]

    def scatter(a: Tensor, b: Tensor) -> Tensor:
        terms = (a.double().unsqueeze(-1) * b.double().unsqueeze(1)).reshape(N * k, D)
        return torch.zeros(num_latents, D, dtype=torch.float64).index_add_(0, indices.flatten(), terms)

    counts = torch.bincount(indices.flatten(), minlength=num_latents).double().unsqueeze(1)
    assert out.dtype == x.dtype
    assert_within(out, scatter(values, x), sum_error(counts, scatter(finite(values), finite(x)), x.dtype))


def exact_scores(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every score (N, M) in fp64, and how far the kernel's own may be from it."""
    exact = x.double() @ weight.double().T
    magnitude = finite(x) @ finite(weight).T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + finite(bias)
    return exact, sum_error(x.shape[1], magnitude, x.dtype)


def assert_topk(
    code: tuple[Tensor, Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    activation: str = "relu",
    latent_scale: Tensor | None = None,
    latent_mask: Tensor | None = None,
) -> None:
    """The code, values included, is what exact selection yields on some scores within the rounding bound."""
    values, indices = code
    N, M = x.shape[0], weight.shape[0]
    assert values.shape == indices.shape == (N, k)
    assert values.dtype == x.dtype
    assert indices.dtype == torch.int64
    assert values.is_contiguous()
    assert indices.is_contiguous()
    if N == 0:
        return
    assert indices.min() >= 0
    assert indices.max() < M
    ordered = indices.sort(dim=1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all(), "a latent was chosen twice"
    if latent_mask is not None:
        assert latent_mask[indices].all(), "a latent that isn't eligible was chosen"

    scores, error = exact_scores(x, weight, bias)
    chosen = scores.gather(1, indices)
    assert_within(values, torch.relu(chosen) if activation == "relu" else chosen, error.gather(1, indices))

    low, high = _key_bounds(scores, error, activation, latent_scale, x.dtype)
    low_chosen, high_chosen = low.gather(1, indices), high.gather(1, indices)
    descending = high_chosen.cummin(dim=1).values[:, :-1] >= low_chosen[:, 1:]
    assert descending.all(), "the chosen latents are not in descending order"
    left = low.scatter(1, indices, -torch.inf)
    if latent_mask is not None:
        left = left.masked_fill(~latent_mask, -torch.inf)
    missed = left.max(dim=1).values > high_chosen.min(dim=1).values
    assert not missed.any(), f"rows {missed.nonzero().flatten().tolist()[:10]}: a larger latent was left out"
    _assert_selected_on_own_values(values, indices, activation, latent_scale)


def _key_bounds(
    scores: Tensor, error: Tensor, activation: str, latent_scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Interval of every selection key; NaN above infinity, and all of it where a sum may have overflowed."""
    info = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    keys = scores
    if latent_scale is not None:
        keys = scores * latent_scale.double()
        error = error * finite(latent_scale).clamp_min(info.tiny) + info.eps * keys.abs() + info.tiny
    keys = keys.abs() if activation == "abs" else keys
    wild = error.isinf() | (keys.isfinite() & (keys.abs() + error >= info.max))
    # NaN and infinities are exact, and NaN is the largest of them.
    error = torch.where(keys.isfinite(), error, 0.0)
    top = torch.finfo(torch.float64).max
    keys = torch.where(keys.isnan(), top, keys.clamp(-top / 2, top / 2))
    return (keys - error).masked_fill(wild, -torch.inf), (keys + error).masked_fill(wild, torch.inf)


def _assert_selected_on_own_values(
    values: Tensor, indices: Tensor, activation: str, latent_scale: Tensor | None
) -> None:
    """Selection was made on the very scores that came out: their keys never rise along a row."""
    if latent_scale is None:
        keys = values.abs() if activation == "abs" else values
    elif activation != "relu" and values.dtype in (torch.float32, torch.float64):
        keys = values * latent_scale[indices]
        keys = keys.abs() if activation == "abs" else keys
    else:  # the scores can't be told from what came out
        return
    rank = torch.where(keys.isnan(), torch.inf, keys)
    assert (rank[:, 1:] <= rank[:, :-1]).all(), "keys of the returned values rise along a row"
    assert (keys.isnan()[:, 1:] <= keys.isnan()[:, :-1]).all(), "NaN is not first"
