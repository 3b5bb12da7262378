"""What the op tests hold an answer against: the same sums in fp64, with a rigorous bound on fp32's rounding.

A sum of n products in precision u, in any order, fused or not, is off by at most gamma_n sum |a b| with
gamma_n = n u / (1 - n u) (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1), plus half
the least subnormal for every product that underflows. No tolerance in the op tests is looser than that.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "transposed", "strided", "misaligned")


def shapes(*sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """As few shapes as have all the values of each size: the longest list, beside which others start again.

    Example:
        >>> shapes((1, 2, 3), (7, 8), (5,))
        [(1, 7, 5), (2, 8, 5), (3, 7, 5)]
    """
    return list(islice(zip(*map(cycle, sizes), strict=True), max(map(len, sizes))))


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A 1-D or 2-D tensor's values in another memory layout; memory between its elements holds poison."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() == 2 else tensor.contiguous()
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
    least = info.smallest_normal * (1 if _flushing else info.eps)
    error = gamma * magnitude + terms * least
    return torch.where(magnitude * (1 + gamma) < info.max, error, torch.inf)


_flushing = False


@contextmanager
def flushing() -> Iterator[None]:
    """Allow for products and sums that are 0 where they would be subnormal."""
    global _flushing
    _flushing = True
    try:
        yield
    finally:
        _flushing = False


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


def entry_rows(indices: Tensor, offsets: Tensor | None) -> Tensor:
    """(E,) the row of every entry of a code (N, k), or of those that offsets bound the rows of."""
    counts = torch.full(indices.shape[:1], indices.shape[-1]) if offsets is None else offsets.diff()
    return torch.arange(len(counts)).repeat_interleave(counts)


def assert_sums(
    out: Tensor,
    to: Tensor,
    values: Tensor,
    of: Tensor,
    matrix: Tensor,
    bias: Tensor | None = None,
) -> None:
    """``out[i]`` sums ``values[e] * matrix[of[e]]`` where ``to[e]`` is i, NaN and infinities included."""
    (rows, D), dtype = out.shape, matrix.dtype
    values = values.flatten()[: len(to)]

    def scatter(a: Tensor, b: Tensor) -> Tensor:
        terms = a.double().unsqueeze(-1) * b.double()[of]
        return torch.zeros(rows, D, dtype=torch.float64).index_add_(0, to, terms)

    exact, magnitude = scatter(values, matrix), scatter(finite(values), finite(matrix))
    error = sum_error(torch.bincount(to, minlength=rows).double().unsqueeze(1), magnitude, dtype)
    if bias is not None:  # the sum is rounded to the output's dtype before the bias is added
        unit = torch.finfo(dtype).eps / 2
        error = error + 4 * unit * (magnitude + finite(bias)) + 4 * torch.finfo(dtype).tiny
        exact = exact + bias.double()
    assert out.dtype == dtype
    assert_within(out, exact, error)


def assert_spmm(
    out: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """``out`` is the code times the matrix (plus bias) up to fp32 rounding, NaN and infinities included."""
    rows = entry_rows(indices, offsets)
    assert out.shape == ((len(indices) if offsets is None else len(offsets) - 1), weight.shape[1])
    assert_sums(out, rows, values, indices.flatten()[: len(rows)], weight, bias)


def assert_sddmm(
    out: Tensor, x: Tensor, weight: Tensor, indices: Tensor, offsets: Tensor | None = None
) -> None:
    """``out`` is ``x @ weight.T`` at the indices up to fp32 rounding, and 0 behind the last row."""
    rows = entry_rows(indices, offsets)
    tokens, atoms = x[rows], weight[indices.flatten()[: len(rows)]]
    exact = (tokens.double() * atoms.double()).sum(-1)
    magnitude = (finite(tokens) * finite(atoms)).sum(-1)
    assert out.shape == indices.shape
    assert out.dtype == x.dtype
    assert_within(out.flatten()[: len(rows)], exact, sum_error(x.shape[1], magnitude, x.dtype))
    assert not out.flatten()[len(rows) :].any()


def assert_spmm_t(
    out: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    num_latents: int,
    offsets: Tensor | None = None,
) -> None:
    """``out`` is the transposed code times ``x`` up to fp32 rounding."""
    rows = entry_rows(indices, offsets)
    assert out.shape == (num_latents, x.shape[1])
    assert_sums(out, indices.flatten()[: len(rows)], values, rows, x)


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


def assert_batch_topk(
    code: tuple[Tensor, Tensor, Tensor, Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    total: int,
    activation: str = "relu",
    latent_scale: Tensor | None = None,
    latent_mask: Tensor | None = None,
) -> None:
    """As :func:`assert_topk`, of the largest of the whole batch, by rows and latents."""
    values, indices, offsets, threshold = code
    N, M = x.shape[0], weight.shape[0]
    assert values.shape == indices.shape == (total,)
    assert offsets.shape == (N + 1,)
    assert threshold.shape == ()
    assert values.dtype == x.dtype
    assert indices.dtype == offsets.dtype == torch.int64
    assert threshold.dtype == torch.promote_types(x.dtype, torch.float32)
    assert all(tensor.is_contiguous() for tensor in code)
    assert offsets[0] == 0
    assert offsets[-1] == total
    assert indices.min() >= 0
    assert indices.max() < M
    places = torch.arange(N).repeat_interleave(offsets.diff()) * M + indices
    assert (places.diff() > 0).all(), "the entries are not in order, or one was chosen twice"
    if latent_mask is not None:
        assert latent_mask[indices].all(), "a latent that isn't eligible was chosen"

    scores, error = exact_scores(x, weight, bias)
    chosen = scores.flatten()[places]
    assert_within(values, torch.relu(chosen) if activation == "relu" else chosen, error.flatten()[places])

    low, high = _key_bounds(scores, error, activation, latent_scale, x.dtype)
    left = low.flatten().scatter(0, places, -torch.inf).view(N, M)
    if latent_mask is not None:
        left = left.masked_fill(~latent_mask, -torch.inf)
    least_low, least_high = (bound.flatten()[places].min() for bound in (low, high))
    assert left.max() <= least_high, "a larger one was left out"
    top = torch.finfo(torch.float64).max
    least = torch.where(threshold.isnan(), top, threshold.double().clamp(-top / 2, top / 2))
    assert least_low <= least <= least_high, "threshold is not the least key"
    if latent_scale is None and activation != "relu" and x.dtype in (torch.float32, torch.float64):
        keys = values.abs() if activation == "abs" else values
        assert keys.nan_to_num(torch.inf, torch.inf).min() == threshold.nan_to_num(torch.inf, torch.inf)


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


def assert_pursuit(
    pursuit: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    dictionary: Tensor,
    *,
    k: int,
    tol: float = 0.0,
    nonnegative: bool = False,
    normalized: bool = False,
) -> None:
    """Every step is a greedy one, on the residual that the steps before it left, up to fp32 rounding.

    The residuals are rebuilt in fp64 from the steps that came out; beside them goes how far the op's own,
    carried in fp32, may be from them. From where a sum may have overflowed a row only has to be well-formed.
    """
    values, indices, residual = pursuit
    (N, D), M = x.shape, dictionary.shape[0]
    assert values.shape == indices.shape == (N, k)
    assert residual.shape == (N, D)
    assert values.dtype == residual.dtype == x.dtype
    assert indices.dtype == torch.int64
    assert all(tensor.is_contiguous() for tensor in pursuit)
    if N == 0:
        return
    assert indices.min() >= 0
    assert indices.max() < M
    atoms, sizes, r = dictionary.double(), finite(dictionary), x.double()
    norms = torch.ones(M, dtype=torch.float64) if normalized else atoms.norm(dim=1)
    double, half = x.dtype == torch.float64, x.dtype in (torch.bfloat16, torch.float16)
    info = torch.finfo(torch.float64 if double else torch.float32)
    # A norm, and what is divided by it: of D squares, two divisions, and what is multiplied instead.
    relative = 0.0 if normalized else (D + 16) * info.eps
    # Subnormal atoms, which some machines take for zeros, and those whose squares underflow in fp64.
    lost = (norms < info.tiny) | (norms.square() < torch.finfo(torch.float64).tiny)
    off = torch.zeros_like(r)  # of the op's residual, elementwise
    wild = ~(r.isfinite().all(dim=1)) | ~atoms.square().sum(dim=1).isfinite().all()
    for t in range(k):
        scores = r @ atoms.T
        wild = wild | ~scores.isfinite().all(dim=1)
        error = sum_error(D, (finite(r) + off) @ sizes.T, x.dtype) + off @ sizes.T
        key, slack = scores / norms, error / norms + relative * scores.abs() / norms
        key, slack = key.masked_fill(norms == 0, 0), slack.masked_fill(lost, torch.inf)
        slack = slack.masked_fill(norms == 0, 0)
        key = key if nonnegative else key.abs()
        length = r.norm(dim=1)
        unsure = off.norm(dim=1) + (D + 4) * info.eps * length
        value, index = values[:, t], indices[:, t : t + 1]
        took = value != 0

        # A step is the best one, and its coefficient the atom's.
        best_low = (key - slack).max(dim=1).values
        greedy = (key + slack).gather(1, index)[:, 0] >= best_low
        allowed = (length + unsure > tol) if tol > 0 else torch.ones_like(wild)
        # No step is taken only where there is none to take.
        over = (best_low <= 0) | ((length - unsure <= tol) if tol > 0 else torch.zeros_like(wild))
        squares = norms.square().clamp_min(torch.finfo(torch.float64).tiny)
        coefficients = scores / squares
        exact = coefficients.gather(1, index)[:, 0]
        # Or where the coefficient of what may be the best is rounded to 0.
        smallest = 1e-7 if half else info.tiny
        over |= (((key + slack) >= best_low[:, None]) & (coefficients.abs() < smallest)).any(dim=1)
        around = (
            (error / squares).gather(1, index)[:, 0] + (relative + 4 * info.eps) * exact.abs() + info.tiny
        )
        around = around.masked_fill(lost[index[:, 0]], torch.inf)
        fine = torch.where(took, greedy & allowed, over | lost.any())
        assert (fine | wild).all(), f"step {t}: rows {(~(fine | wild)).nonzero().flatten().tolist()[:10]}"
        checked = took & ~wild
        assert_within(value[checked], exact[checked], around[checked])
        if not half:
            assert not (index[:, 0].bool() & ~took & ~wild).any(), "an unused slot holds an index"
            if t:
                assert (~took | (values[:, t - 1] != 0) | wild).all(), "a row went on after it had stopped"
        step = value.double().unsqueeze(1) * atoms[index[:, 0]]
        rounding = info.eps * (3 * finite(step) + finite(r) + off) + info.tiny
        if half:  # the value came out rounded, and went on unrounded
            own = torch.finfo(x.dtype)
            rounding += own.eps * finite(step) + own.tiny * sizes[index[:, 0]]
        off = off + rounding
        r = torch.where(wild.unsqueeze(1), r, r - step)
        wild = wild | ~r.isfinite().all(dim=1) | around.isinf() | off.isinf().any(dim=1)
        if nonnegative:
            assert ((value >= 0) | wild).all()
    settled = ~wild
    assert_within(residual[settled], r[settled], off[settled])


def clear_rows(x: Tensor, dictionary: Tensor, *, k: int, nonnegative: bool, normalized: bool) -> tuple:
    """Indices (N, k) by matching pursuit in fp64, and the rows on which fp32 can't but choose the same.

    There every best score leads the next, and 0, by more than rounding. In norms: a step projects the error
    of the residual, which doesn't grow by that; its own rounding adds to it.
    """
    D = x.shape[1]
    atoms, r = dictionary.double(), x.double()
    norms = torch.ones(len(atoms), dtype=torch.float64) if normalized else atoms.norm(dim=1)
    unit = torch.finfo(torch.float32).eps * (D + 16)
    error = torch.zeros(len(x), dtype=torch.float64)
    clear, indices = torch.ones(len(x), dtype=torch.bool), []
    for _ in range(k):
        scores = r @ atoms.T / norms
        best = (scores if nonnegative else scores.abs()).topk(2, dim=1).values
        index = (scores if nonnegative else scores.abs()).argmax(dim=1)
        length = r.norm(dim=1)
        bound = (error + unit * (length + error)) * 1.01
        clear &= (best[:, 0] - best[:, 1] > 2 * bound) & (best[:, 0] > bound)
        indices.append(index)
        r = r - (scores.gather(1, index[:, None]) / norms[index][:, None]) * atoms[index]
        error = error + 2 * unit * (length + error)
    return torch.stack(indices, dim=1), clear
