"""MatchingPursuitSAE against a textbook loop over atoms, and the life of its atoms."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastsparse
from fastsparse.nn import MatchingPursuitSAE, SAELoss, fvu

D, M, K = 12, 40, 5


def make(
    seed: int = 0, *, d_model: int = D, num_latents: int = M, k: int = K, **options
) -> MatchingPursuitSAE:
    generator = torch.Generator().manual_seed(seed)
    return MatchingPursuitSAE(d_model, num_latents, k, generator=generator, **options)


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def off_centre(**options) -> MatchingPursuitSAE:
    """In fp64, with a bias."""
    sae = make(dtype=torch.float64, **options)
    with torch.no_grad():
        sae.b_dec.copy_(tokens(D, dtype=torch.float64, seed=2))
    return sae


def textbook_pursuit(r: torch.Tensor, atoms: torch.Tensor, k: int, nonnegative: bool) -> torch.Tensor:
    """What is left of rows: dense codes and PyTorch's own gradient; they stop where no score is positive."""
    for _ in range(k):
        scores = r @ atoms.T
        best = (scores if nonnegative else scores.abs()).max(dim=1)
        chosen = F.one_hot(best.indices, len(atoms)) * (best.values > 0).unsqueeze(1)
        r = r - (scores * chosen) @ atoms
    return r


def textbook_loss(sae: MatchingPursuitSAE, x: torch.Tensor, dead: torch.Tensor | None = None) -> torch.Tensor:
    residual = textbook_pursuit(x - sae.b_dec, sae.W_dec, sae.k, sae.nonnegative)
    loss = residual.pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    if dead is not None:
        error = residual.detach()
        steps = min(sae.aux_k, int(dead.sum()))
        again = textbook_pursuit(error, sae.W_dec[dead], steps, sae.nonnegative)
        loss = loss + sae.aux_weight * again.pow(2).sum() / (error - error.mean(0)).pow(2).sum()
    return loss


def gradients(sae: MatchingPursuitSAE, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [name for name, _ in sae.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(sae.parameters())), strict=True))


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("num_dead", [0, 3, 20])
def test_loss_and_gradients_are_the_textbooks(num_dead: int, nonnegative: bool) -> None:
    sae = off_centre(aux_k=4, dead_after=100, nonnegative=nonnegative)
    dead = torch.zeros(M, dtype=torch.bool)
    dead[torch.randperm(M, generator=torch.Generator().manual_seed(3))[:num_dead]] = True
    sae.tokens_since_fired[dead] = 100
    x = tokens(33, D, dtype=torch.float64)
    out = sae.loss(x)
    expected = textbook_loss(sae, x, dead if num_dead else None)
    assert isinstance(out, SAELoss)
    torch.testing.assert_close(out.loss, expected)
    assert out.num_dead == num_dead
    assert (out.aux > 0) == (num_dead > 0)
    torch.testing.assert_close(out.fvu, textbook_loss(sae, x))
    torch.testing.assert_close(gradients(sae, out.loss), gradients(sae, expected))


def test_gradient_to_the_input_is_the_textbooks() -> None:
    sae = off_centre()
    x = tokens(9, D, dtype=torch.float64).requires_grad_()
    (ours,) = torch.autograd.grad(sae.loss(x).loss, x)
    (expected,) = torch.autograd.grad(textbook_loss(sae, x), x)
    torch.testing.assert_close(ours, expected)


def test_encode_decode_forward_agree_with_leading_dimensions() -> None:
    sae = off_centre()
    x = tokens(3, 4, D, dtype=torch.float64)
    code = sae.encode(x)
    assert isinstance(code, fastsparse.Pursuit)
    assert code.values.shape == code.indices.shape == (3, 4, K)
    assert code.values.min() >= 0
    torch.testing.assert_close(sae.decode(code), sae(x))
    torch.testing.assert_close(sae.decode(code), x - code.residual)
    torch.testing.assert_close(sae.decode(code.values, code.indices), sae(x))
    torch.testing.assert_close(sae.loss(x).fvu, fvu(sae(x), x))


def test_more_steps_leave_less() -> None:
    """Nested codes, an error that falls with every step, and rows that stop on their own at a tolerance."""
    sae, x = off_centre(), tokens(50, D, dtype=torch.float64)
    codes = [sae.encode(x, k=k) for k in (1, 2, 5, 10, 40)]
    errors = [code.residual.norm(dim=1) for code in codes]
    for fewer, more in itertools.pairwise(codes):
        assert torch.equal(more.indices[:, : fewer.indices.shape[1]], fewer.indices)
    assert all((after < before).all() for before, after in itertools.pairwise(errors))
    settled = sae.encode(x, k=200, tol=0.5)
    steps = (settled.values > 0).sum(dim=1)
    assert (settled.residual.norm(dim=1) <= 0.5).all()
    assert len(steps.unique()) > 3
    assert torch.equal(sae.encode(x).indices, codes[2].indices)


def test_initial_state() -> None:
    sae = make()
    assert [name for name, _ in sae.named_parameters()] == ["W_dec", "b_dec"]
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M))
    assert not sae.b_dec.any()
    assert not sae.tokens_since_fired.any()
    assert sae.aux_k == K
    assert torch.equal(make().W_dec, sae.W_dec)
    assert not torch.equal(make(1).W_dec, sae.W_dec)


def test_counters_count_tokens_since_an_atom_was_taken() -> None:
    sae = make(d_model=3, num_latents=3, k=2)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(3))
    sae.loss(torch.tensor([[2.0, 1.0, -1.0], [3.0, -1.0, -2.0]]))
    assert sae.tokens_since_fired.tolist() == [0, 0, 2]
    out = sae.loss(torch.tensor([[3.0, -1.0, -2.0]]))  # the second slot stays unused, with value 0, index 0
    assert sae.tokens_since_fired.tolist() == [0, 1, 3]
    assert out.l0 == 1
    signed = make(d_model=3, num_latents=3, k=2, nonnegative=False)
    with torch.no_grad():
        signed.W_dec.copy_(torch.eye(3))
    signed.loss(torch.tensor([[3.0, -1.0, -2.0]]))
    assert signed.tokens_since_fired.tolist() == [0, 1, 0]


def test_evaluation_neither_counts_nor_revives() -> None:
    sae = make(dead_after=1).eval()
    sae.tokens_since_fired.fill_(5)
    out = sae.loss(tokens(7, D))
    assert out.aux == 0
    assert out.loss == out.fvu
    assert (sae.tokens_since_fired == 5).all()


def train(sae: MatchingPursuitSAE, atoms: torch.Tensor, steps: int) -> SAELoss:
    """On sums of two of the atoms, away from the origin."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(6)
    for _ in range(steps):
        chosen = torch.rand(64, len(atoms), generator=generator).topk(2, dim=1).indices
        optimizer.zero_grad()
        out = sae.loss((atoms[chosen] * (1 + torch.rand(64, 2, 1, generator=generator))).sum(dim=1))
        out.loss.backward()
        sae.remove_parallel_gradient_()
        optimizer.step()
        sae.normalize_decoder_()
    return out


def test_it_learns() -> None:
    sae = make(num_latents=30, k=2)
    atoms = F.normalize(tokens(30, D, seed=5), dim=1)
    before = train(sae, atoms, 1).fvu
    after = train(sae, atoms, 300).fvu
    assert after < 0.5 * before
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(30))


def test_dead_atoms_are_revived_by_the_auxiliary_loss() -> None:
    """The data lie in half of the dimensions; a third of the atoms lie in the other half."""

    def dead_after_training(aux_weight: float) -> int:
        sae = make(num_latents=30, k=2, aux_weight=aux_weight, dead_after=600)
        with torch.no_grad():
            sae.W_dec[:10, : D // 2] *= 0.02
            sae.W_dec[:10, D // 2 :] = sae.W_dec[:10, D // 2 :].abs()
        sae.normalize_decoder_()
        atoms = tokens(30, D, seed=5)
        atoms[:, D // 2 :] = 0
        train(sae, F.normalize(atoms, dim=1), 200)
        return int(sae.dead[:10].sum())

    assert dead_after_training(aux_weight=0.0) >= 6
    assert dead_after_training(aux_weight=1 / 32) <= 2


def test_atoms_keep_norm_1_for_the_gradient() -> None:
    sae = off_centre()
    sae.loss(tokens(20, D, dtype=torch.float64)).loss.backward()
    before = sae.W_dec.grad.clone()
    sae.remove_parallel_gradient_()
    along = (before * sae.W_dec).sum(dim=1, keepdim=True)
    torch.testing.assert_close(sae.W_dec.grad, before - along * sae.W_dec)
    assert along.abs().max() > 1e-3
    with torch.no_grad():
        sae.W_dec[3] *= 1.5
    with pytest.raises(ValueError, match=r"atoms of norm 1 .*got norm 1.5 at atom 3"):
        sae(tokens(2, D, dtype=torch.float64))
    sae.normalize_decoder_()
    sae(tokens(2, D, dtype=torch.float64))


def test_decoder_bias_from_a_sample() -> None:
    x = tokens(200, D) + 3
    sae = make()
    sae.init_decoder_bias_(x, method="mean")
    torch.testing.assert_close(sae.b_dec.data, x.mean(dim=0))
    sae.init_decoder_bias_(x)
    pull = F.normalize(x - sae.b_dec, dim=1).sum(dim=0)  # the geometric median's defining property
    assert pull.norm() < 0.05


@pytest.mark.parametrize(
    "x",
    [torch.full((1, D), 3.0), torch.full((50, D), 1e4 / 3), torch.zeros(4, D), tokens(1, D)],
    ids=["one token", "constant", "zeros", "one random token"],
)
def test_degenerate_batches_train_without_nan(x: torch.Tensor) -> None:
    sae = make(dead_after=10)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    sae.tokens_since_fired[:9] = 10
    for _ in range(3):
        out = sae.loss(x)
        assert out.num_dead > 0
        out.loss.backward()
        sae.remove_parallel_gradient_()
        optimizer.step()
        sae.normalize_decoder_()
        assert 0 <= out.loss < 100
    assert all(parameter.isfinite().all() for parameter in sae.parameters())


def test_nan_inputs_surface() -> None:
    x = tokens(4, D)
    x[1, 2] = torch.nan
    assert make().loss(x).loss.isnan()


def test_state_dict_round_trip() -> None:
    sae = make(0)
    sae.loss(tokens(8, D))
    other = make(1)
    assert other.load_state_dict(sae.state_dict(), strict=True)
    x = tokens(20, D)
    assert torch.equal(other(x), sae(x))
    assert torch.equal(other.tokens_since_fired, sae.tokens_since_fired)
    assert sae.tokens_since_fired.any()
    with pytest.raises(RuntimeError, match="size mismatch"):
        make(num_latents=M + 1).load_state_dict(sae.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_moves(dtype: torch.dtype) -> None:
    sae = make().to(dtype)
    x = tokens(30, D, dtype=dtype)
    out = sae.loss(x)
    out.loss.backward()
    assert sae.W_dec.grad.dtype == sae(x).dtype == dtype
    torch.testing.assert_close(out.fvu.float(), make().loss(x.float()).fvu, atol=0.03, rtol=0)


def test_autocast() -> None:
    sae, x = make(), tokens(64, D)
    exact = sae.loss(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert sae(x).dtype == torch.bfloat16
        out = sae.loss(x)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.fvu, exact.fvu, atol=0.02, rtol=0)
    out.loss.backward()
    assert sae.W_dec.grad.dtype == torch.float32


def test_compiled_forward_equals_eager() -> None:
    sae = make()
    compiled = torch.compile(sae, fullgraph=True, dynamic=True, backend="aot_eager")
    for N in (5, 9):
        x = tokens(N, D)
        torch.testing.assert_close(compiled(x), sae(x))
        sae.zero_grad()
        sae(x).sum().backward()
        eager = {name: parameter.grad for name, parameter in sae.named_parameters()}
        sae.zero_grad()
        compiled(x).sum().backward()
        torch.testing.assert_close({n: p.grad for n, p in sae.named_parameters()}, eager)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda() -> None:
    sae, x = make(dead_after=10), tokens(40, D)
    expected = sae.loss(x).loss
    moved = make(dead_after=10).cuda()
    torch.testing.assert_close(moved.loss(x.cuda()).loss.cpu(), expected)
    assert torch.equal(moved.tokens_since_fired.cpu(), sae.tokens_since_fired)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 8, 2), {}, ValueError, "d_model must be at least 1, got 0"),
        ((4, 8, 0), {}, ValueError, "k must be at least 1, got 0"),
        ((4, 8, 2.0), {}, TypeError, "k must be an int, got 2.0 of type float"),
        ((4, True, 1), {}, TypeError, "num_latents must be an int, got True"),
        ((4, 8, 2), {"aux_k": -1}, ValueError, "aux_k must be at least 0, got -1"),
        ((4, 8, 2), {"dead_after": 0}, ValueError, "dead_after must be at least 1, got 0"),
        ((4, 8, 2), {"aux_weight": float("nan")}, ValueError, "aux_weight must be finite.*got nan"),
        ((4, 8, 2), {"nonnegative": 1}, TypeError, "nonnegative must be a bool, got 1"),
    ],
)
def test_bad_sizes(arguments: tuple, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^MatchingPursuitSAE: {message}"):
        MatchingPursuitSAE(*arguments, **options)


def test_more_steps_than_atoms() -> None:
    sae = make(num_latents=3, k=9)
    assert sae.encode(tokens(4, D)).indices.shape == (4, 9)


@pytest.mark.parametrize("method", ["encode", "forward", "loss", "init_decoder_bias_"])
def test_bad_inputs(method: str) -> None:
    call = getattr(make(), method)
    with pytest.raises(ValueError, match=r"^MatchingPursuitSAE.*x must have shape \(..., D\) with D = 12"):
        call(torch.ones(7, 1))  # would broadcast against b_dec
    with pytest.raises(TypeError, match=r"x must be float32, .*got int64"):
        call(torch.ones(7, D, dtype=torch.int64))


def test_bad_encodings() -> None:
    sae, x = make(), tokens(4, D)
    with pytest.raises(ValueError, match="k must be at least 1, got k=0"):
        sae.encode(x, k=0)
    with pytest.raises(ValueError, match="tol must be finite and at least 0, got tol=-1"):
        sae.encode(x, tol=-1.0)
    with pytest.raises(TypeError, match=r"MatchingPursuitSAE\.decode: indices must be given with values"):
        sae.decode(torch.ones(2, K))
    assert sae(x[:0]).shape == (0, D)
