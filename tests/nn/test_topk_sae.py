"""TopKSAE against a dense textbook autoencoder, and the life of its latents."""

import pytest
import torch
import torch.nn.functional as F

import fastsparse
from fastsparse.nn import TopKSAE, fvu

D, M, K = 12, 40, 5


def make(seed: int = 0, *, d_model: int = D, num_latents: int = M, k: int = K, **options) -> TopKSAE:
    return TopKSAE(d_model, num_latents, k, generator=torch.Generator().manual_seed(seed), **options)


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scrambled(seed: int = 2, **options) -> TopKSAE:
    """In fp64, with every parameter away from its initial value; atoms of norm 1."""
    sae = make(dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    sae.normalize_decoder_()
    return sae


def dense_code(pre: torch.Tensor, k: int) -> torch.Tensor:
    """(N, M): the k largest of every row, rectified, everything else 0."""
    top = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())


def textbook_loss(sae: TopKSAE, x: torch.Tensor, dead: torch.Tensor | None = None) -> torch.Tensor:
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    reconstruction = dense_code(pre, sae.k) @ sae.W_dec + sae.b_dec
    loss = (x - reconstruction).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    if dead is not None:
        error = (x - reconstruction).detach()
        code = dense_code(pre.masked_fill(~dead, -torch.inf), min(sae.aux_k, int(dead.sum())))
        again = (error - code @ sae.W_dec).pow(2).sum() / (error - error.mean(0)).pow(2).sum()
        loss = loss + sae.aux_weight * again
    return loss


def gradients(sae: TopKSAE, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [name for name, _ in sae.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(sae.parameters())), strict=True))


@pytest.mark.parametrize("num_dead", [0, 3, 20])
def test_loss_and_gradients_are_the_textbooks(num_dead: int) -> None:
    sae = scrambled(aux_k=8, dead_after=100)
    dead = torch.zeros(M, dtype=torch.bool)
    dead[torch.randperm(M, generator=torch.Generator().manual_seed(3))[:num_dead]] = True
    sae.tokens_since_fired[dead] = 100
    x = tokens(33, D, dtype=torch.float64)
    out = sae.loss(x)
    expected = textbook_loss(sae, x, dead if num_dead else None)
    torch.testing.assert_close(out.loss, expected)
    assert out.num_dead == num_dead
    assert (out.aux > 0) == (num_dead > 0)
    torch.testing.assert_close(out.fvu, textbook_loss(sae, x))
    torch.testing.assert_close(gradients(sae, out.loss), gradients(sae, expected))


def test_gradient_to_the_input_is_the_textbooks() -> None:
    sae = scrambled()
    x = tokens(9, D, dtype=torch.float64).requires_grad_()
    (ours,) = torch.autograd.grad(sae.loss(x).loss, x)
    (expected,) = torch.autograd.grad(textbook_loss(sae, x), x)
    torch.testing.assert_close(ours, expected)


def test_evaluation_neither_counts_nor_revives() -> None:
    sae = make(dead_after=1).eval()
    sae.tokens_since_fired.fill_(5)
    out = sae.loss(tokens(7, D))
    assert out.aux == 0
    assert out.loss == out.fvu
    assert (sae.tokens_since_fired == 5).all()


def test_encode_decode_forward_agree_with_leading_dimensions() -> None:
    sae = scrambled()
    x = tokens(3, 4, D, dtype=torch.float64)
    code = sae.encode(x)
    assert isinstance(code, fastsparse.TopK)
    assert code.values.shape == code.indices.shape == (3, 4, K)
    torch.testing.assert_close(sae.decode(code), sae(x))
    torch.testing.assert_close(sae.decode(code.values, code.indices), sae(x))
    torch.testing.assert_close(sae.loss(x).fvu, fvu(sae(x), x))


def test_initial_state() -> None:
    sae = make()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    assert not sae.tokens_since_fired.any()
    assert torch.equal(make().W_dec, sae.W_dec)
    assert not torch.equal(make(1).W_dec, sae.W_dec)


@pytest.mark.parametrize(
    ("d_model", "aux_k"), [(1, 1), (2, 1), (384, 256), (512, 256), (768, 512), (4096, 2048)]
)
def test_default_aux_k_is_the_power_of_two_nearest_half_the_width(d_model: int, aux_k: int) -> None:
    # log2(384 / 2) = 7.58 is nearer to 8 than to 7.
    assert TopKSAE(d_model, 4, 1).aux_k == aux_k


def test_counters_count_tokens_since_a_positive_value() -> None:
    sae = make(d_model=3, num_latents=3, k=2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
    x = torch.tensor([[2.0, 1.0, -1.0], [3.0, -1.0, -2.0]])  # the second token's runner-up is rectified to 0
    sae.loss(x)
    assert sae.tokens_since_fired.tolist() == [0, 0, 2]
    sae.loss(x[1:])
    assert sae.tokens_since_fired.tolist() == [0, 1, 3]
    assert sae.loss(x).l0 == 1.5


def test_dead_latents_are_revived_by_the_auxiliary_loss() -> None:
    """A third of the latents is pushed down: positive at times, but never among the k largest."""

    def train(aux_weight: float) -> int:
        sae = make(num_latents=30, k=2, aux_weight=aux_weight, aux_k=4, dead_after=600)
        with torch.no_grad():
            sae.b_enc[:10] = -0.8
        atoms = F.normalize(tokens(30, D, seed=5), dim=1)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(6)
        for _ in range(150):
            chosen = torch.rand(64, 30, generator=generator).topk(2, dim=1).indices
            x = atoms[chosen].sum(dim=1)
            optimizer.zero_grad()
            sae.loss(x).loss.backward()
            sae.remove_parallel_gradient_()
            optimizer.step()
            sae.normalize_decoder_()
        return int(sae.dead[:10].sum())

    assert train(aux_weight=0.0) >= 8
    assert train(aux_weight=1 / 32) <= 2


def test_unit_norm_handling() -> None:
    sae = scrambled()
    sae.loss(tokens(20, D, dtype=torch.float64)).loss.backward()
    before = sae.W_dec.grad.clone()
    sae.remove_parallel_gradient_()
    along = (before * sae.W_dec).sum(dim=1, keepdim=True)
    torch.testing.assert_close(sae.W_dec.grad, before - along * sae.W_dec)
    assert along.abs().max() > 1e-3
    torch.testing.assert_close(
        (sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(M).double(), atol=1e-12, rtol=0
    )
    with torch.no_grad():
        sae.W_dec.mul_(3)
        sae.W_dec[1] = 0
    sae.normalize_decoder_()
    norms = sae.W_dec.norm(dim=1)
    assert norms[1] == 0
    torch.testing.assert_close(norms[2:], torch.ones(M - 2).double())


def test_row_blocks_cover_wide_matrices() -> None:
    sae = make(d_model=300_000, num_latents=3, k=1)  # one row exceeds a block
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(3))


def test_decoder_bias_from_a_sample() -> None:
    x = tokens(200, D) + 3
    x[:20] += 1000  # outliers
    sae = make()
    sae.init_decoder_bias_(x, method="mean")
    torch.testing.assert_close(sae.b_dec.data, x.mean(dim=0))
    sae.init_decoder_bias_(x)
    # The defining property of the geometric median: unit vectors to all points sum to 0.
    pull = F.normalize(x - sae.b_dec, dim=1).sum(dim=0)
    assert pull.norm() < 0.05
    assert (sae.b_dec - 3).abs().max() < 1
    sae.init_decoder_bias_(torch.full((5, D), 2.0))
    torch.testing.assert_close(sae.b_dec.data, torch.full((D,), 2.0))
    sae.init_decoder_bias_(torch.zeros(1, D))
    assert not sae.b_dec.any()


@pytest.mark.parametrize(
    "x",
    [torch.full((1, D), 3.0), torch.full((50, D), 1e4 / 3), torch.zeros(4, D), tokens(1, D)],
    ids=["one token", "constant", "zeros", "one random token"],
)
def test_degenerate_batches_train_without_nan(x: torch.Tensor) -> None:
    sae = make(dead_after=10, aux_k=4)
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


def test_perfect_reconstruction_with_dead_latents_is_finite() -> None:
    sae = make(d_model=3, num_latents=5, k=2, dead_after=1)
    with torch.no_grad():
        sae.W_enc[:3] = sae.W_dec[:3] = torch.eye(3)
    sae.tokens_since_fired[3:] = 1
    out = sae.loss(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    assert out.num_dead == 2
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in sae.parameters())


def test_nan_inputs_surface() -> None:
    x = tokens(4, D)
    x[1, 2] = torch.nan
    assert make().loss(x).loss.isnan()


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
    assert sae.tokens_since_fired.dtype == torch.int64
    x = tokens(30, D, dtype=dtype)
    out = sae.loss(x)
    out.loss.backward()
    assert sae.W_enc.grad.dtype == sae(x).dtype == dtype
    torch.testing.assert_close(out.fvu.float(), make().loss(x.float()).fvu, atol=0.03, rtol=0)


def test_narrow_activations_are_taken_in_the_parameters_dtype() -> None:
    sae, x = make(), tokens(30, D).bfloat16()
    assert torch.equal(sae(x), sae(x.float()))


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
        ((4, 8, 9), {}, ValueError, r"k must be at most num_latents \(8\), got k=9"),
        ((4, 8, 0), {}, ValueError, "k must be at least 1, got 0"),
        ((4, 8.0, 2), {}, TypeError, "num_latents must be an int, got 8.0 of type float"),
        ((4, True, 1), {}, TypeError, "num_latents must be an int, got True"),
        ((4, 8, 2), {"aux_k": -1}, ValueError, "aux_k must be at least 0, got -1"),
        ((4, 8, 2), {"dead_after": 0}, ValueError, "dead_after must be at least 1, got 0"),
        ((4, 8, 2), {"aux_weight": float("nan")}, ValueError, "aux_weight must be finite.*got nan"),
    ],
)
def test_bad_sizes(arguments: tuple, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        TopKSAE(*arguments, **options)


@pytest.mark.parametrize("method", ["encode", "forward", "loss", "init_decoder_bias_"])
def test_bad_inputs(method: str) -> None:
    call = getattr(make(), method)
    with pytest.raises(ValueError, match=r"x must have shape \(..., D\) with D = 12, got shape \(7, 1\)"):
        call(torch.ones(7, 1))  # would broadcast against b_dec
    with pytest.raises(TypeError, match=r"x must be float32, .*got int64"):
        call(torch.ones(7, D, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got list"):
        call([[0.0] * D])


def test_values_without_indices() -> None:
    with pytest.raises(TypeError, match="indices must be given with values, got None"):
        make().decode(torch.ones(2, K))


def test_empty_batches() -> None:
    sae = make()
    assert sae(torch.ones(0, D)).shape == (0, D)
    with pytest.raises(ValueError, match="at least one token"):
        sae.loss(torch.ones(0, D))
    with pytest.raises(ValueError, match="at least one token"):
        sae.init_decoder_bias_(torch.ones(0, D))
    with pytest.raises(ValueError, match=r"method must be .*got 'median'"):
        sae.init_decoder_bias_(torch.ones(2, D), method="median")
