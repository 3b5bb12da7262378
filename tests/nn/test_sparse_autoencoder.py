"""What every kind of sparse autoencoder does alike."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from autoencoders import OPTIONS, D, K, M, gradients, make, scrambled, textbook_loss, tokens, train
from torch.utils.checkpoint import checkpoint

from fastsparse import BatchTopK, Ragged, TopK
from fastsparse.nn import BatchTopKSAE, MatchingPursuitSAE, SAELoss, SparseAutoencoder, TopKSAE, fvu

pytestmark = pytest.mark.parametrize("kind", [TopKSAE, BatchTopKSAE, MatchingPursuitSAE, *OPTIONS])


def test_initial_state(kind: type) -> None:
    sae = make(kind)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M))
    assert not sae.b_dec.any()
    assert not sae.tokens_since_fired.any()
    assert torch.equal(make(kind).W_dec, sae.W_dec)
    assert not torch.equal(make(kind, 1).W_dec, sae.W_dec)


def test_encode_decode_forward_agree_with_leading_dimensions(kind: type) -> None:
    sae = scrambled(kind)
    x = tokens(3, 4, D, dtype=torch.float64)
    code = sae.encode(x)
    if isinstance(code, Ragged | BatchTopK):
        assert code.offsets.shape == (13,)
        dense = Ragged(*code[:3]).to_dense(M)
        torch.testing.assert_close(dense @ sae.W_dec + sae.b_dec, sae(x).flatten(0, 1))
        x = x.flatten(0, 1)
    else:
        assert code.values.shape == code.indices.shape == (3, 4, K)
        torch.testing.assert_close(sae.decode(code.values, code.indices), sae(x))
    assert code.values.min() >= 0
    torch.testing.assert_close(sae.decode(code), sae(x))
    torch.testing.assert_close(sae.loss(x).fvu, fvu(sae(x), x))


@pytest.mark.parametrize("num_dead", [0, 3, 20])
def test_loss_and_gradients_are_the_textbooks(kind: type, num_dead: int) -> None:
    dead = torch.zeros(M, dtype=torch.bool)
    dead[torch.randperm(M, generator=torch.Generator().manual_seed(3))[:num_dead]] = True
    for options in ({}, {"nonnegative": False}) if kind is MatchingPursuitSAE else ({},):
        sae = scrambled(kind, aux_k=4, dead_after=100, **options)
        sae.tokens_since_fired[dead] = 100
        x = tokens(33, D, dtype=torch.float64).requires_grad_()
        out = sae.loss(x)
        expected = textbook_loss(sae, x, dead if num_dead else None)
        assert isinstance(out, SAELoss)
        torch.testing.assert_close(out.loss, expected)
        assert out.num_dead == num_dead
        assert (out.aux > 0) == (num_dead > 0)
        torch.testing.assert_close(out.fvu + out.penalty, textbook_loss(sae, x))
        leaves = [x, *sae.parameters()]
        torch.testing.assert_close(
            torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves)
        )


def test_evaluation_does_not_revive(kind: type) -> None:
    sae = make(kind, dead_after=1)
    sae.count_firings_(sae.encode(tokens(7, D)))
    sae.eval().tokens_since_fired.fill_(5)
    out = sae.loss(tokens(7, D))
    assert out.num_dead == M
    assert out.aux == 0
    assert out.loss == out.fvu + out.penalty


def push_down(sae: SparseAutoencoder) -> torch.Tensor:
    """Leave a third of the latents without a part in the data; returns the atoms that those are made of."""
    atoms = tokens(30, D, seed=5)
    with torch.no_grad():
        if not isinstance(sae, MatchingPursuitSAE):  # positive at times, but never among the k largest
            sae.b_enc[:10] = -1.2
        else:  # the data lie in one half of the dimensions, these in the other
            sae.W_dec[:10, : D // 2] *= 0.02
            sae.W_dec[:10, D // 2 :] = sae.W_dec[:10, D // 2 :].abs()
            atoms[:, D // 2 :] = 0
    sae.normalize_decoder_()
    return F.normalize(atoms, dim=1)


@pytest.mark.parametrize(("aux_weight", "dead"), [(0.0, range(6, 11)), (1 / 32, range(3))])
def test_dead_latents_are_revived_by_the_auxiliary_loss(kind: type, aux_weight: float, dead: range) -> None:
    if kind in OPTIONS:
        pytest.skip("how many are active is not fixed: a latent without a part is never close to having one")
    sae = make(kind, num_latents=30, k=2, aux_weight=aux_weight, aux_k=4, dead_after=600)
    train(sae, push_down(sae), 200)
    assert int(sae.dead[:10].sum()) in dead


def with_dead_latents(kind: type) -> SparseAutoencoder:
    """A quarter is dead, another would be after the tokens of one batch."""
    sae = scrambled(kind, aux_k=4, dead_after=30)
    sae.tokens_since_fired[::4] = 30
    sae.tokens_since_fired[1::4] = 25
    return sae


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(kind: type, use_reentrant: bool) -> None:
    """The replay in the backward pass scores what the forward pass did, and nothing is counted twice."""
    x = tokens(6, D, dtype=torch.float64).requires_grad_()
    plain, replayed = with_dead_latents(kind), with_dead_latents(kind)
    out = plain.loss(x)
    out.loss.backward()
    assert out.aux > 0
    before = replayed.tokens_since_fired.clone()
    again = SAELoss(*checkpoint(replayed.loss, x, use_reentrant=use_reentrant))
    again.loss.backward()
    assert torch.equal(again.loss, out.loss)
    for name, parameter in plain.named_parameters():
        assert torch.equal(replayed.get_parameter(name).grad, parameter.grad), name
    assert torch.equal(replayed.tokens_since_fired, before)
    replayed.count_firings_(again.code)
    fired = torch.zeros(M, dtype=torch.bool).index_fill_(0, out.code.indices[out.code.values > 0], True)
    assert torch.equal(replayed.tokens_since_fired, torch.where(fired, 0, before + 6))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch.compile, where graphs break
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)  # how many scores are above a threshold
def test_compiled_loss_follows_the_dead_latents(kind: type) -> None:
    sae = scrambled(kind, aux_k=4, dead_after=30)
    compiled = torch.compile(sae.loss, backend="eager")
    for num_dead in (0, 3, 20, 0):
        sae.tokens_since_fired.zero_()[:num_dead] = 30
        x = tokens(6, D, dtype=torch.float64)
        out, expected = compiled(x), sae.loss(x)
        assert out.num_dead == num_dead
        assert torch.equal(out.loss, expected.loss)
        torch.testing.assert_close(gradients(sae, out.loss), gradients(sae, expected.loss))


def test_unit_norm_handling(kind: type) -> None:
    sae = scrambled(kind)
    sae.loss(tokens(20, D, dtype=torch.float64)).loss.backward()
    before = sae.W_dec.grad.clone()
    sae.remove_parallel_gradient_()
    along = (before * sae.W_dec).sum(dim=1, keepdim=True)
    torch.testing.assert_close(sae.W_dec.grad, before - along * sae.W_dec)
    assert along.abs().max() > 1e-3
    left = (sae.W_dec.grad * sae.W_dec).sum(1)
    torch.testing.assert_close(left, torch.zeros(M).double(), atol=1e-12, rtol=0)
    with torch.no_grad():
        sae.W_dec.mul_(3)
        sae.W_dec[1] = 0
    sae.normalize_decoder_()
    norms = sae.W_dec.norm(dim=1)
    assert norms[1] == 0
    torch.testing.assert_close(norms[2:], torch.ones(M - 2).double())


def test_row_blocks_cover_wide_matrices(kind: type) -> None:
    sae = make(kind, d_model=300_000, num_latents=3, k=1)  # one row exceeds a block
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(3))


def test_decoder_bias_from_a_sample(kind: type) -> None:
    x = tokens(200, D) + 3
    x[:20] += 1000  # outliers
    sae = make(kind)
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
def test_degenerate_batches_train_without_nan(kind: type, x: torch.Tensor) -> None:
    sae = make(kind, dead_after=10, aux_k=4)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    sae.tokens_since_fired[:9] = 10
    for _ in range(3):
        out = sae.loss(x)
        assert out.num_dead > 0
        out.loss.backward()
        sae.after_backward_()
        optimizer.step()
        sae.after_step_()
        assert 0 <= out.loss - out.penalty < 100
    assert all(parameter.isfinite().all() for parameter in sae.parameters())


def test_nan_inputs_surface(kind: type) -> None:
    x = tokens(4, D)
    x[1, 2] = torch.nan
    assert make(kind).loss(x).loss.isnan()


def test_state_dict_round_trip(kind: type) -> None:
    sae = make(kind, 0)
    sae.count_firings_(sae.encode(tokens(2, D)))
    other = make(kind, 1)
    assert other.load_state_dict(sae.state_dict(), strict=True)
    x = tokens(20, D)
    assert torch.equal(other(x), sae(x))
    assert torch.equal(other.tokens_since_fired, sae.tokens_since_fired)
    assert sae.tokens_since_fired.any()
    with pytest.raises(RuntimeError, match="size mismatch"):
        make(kind, num_latents=M + 1).load_state_dict(sae.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_moves(kind: type, dtype: torch.dtype) -> None:
    sae = make(kind).to(dtype)
    assert sae.tokens_since_fired.dtype == torch.int64
    x = tokens(30, D, dtype=dtype)
    out = sae.loss(x)
    out.loss.backward()
    assert all(parameter.grad.dtype == dtype for parameter in sae.parameters())
    assert sae(x).dtype == dtype
    torch.testing.assert_close(out.fvu.float(), make(kind).loss(x.float()).fvu, atol=0.03, rtol=0)


def test_narrow_activations_are_taken_in_the_parameters_dtype(kind: type) -> None:
    sae, x = make(kind), tokens(30, D).bfloat16()
    assert torch.equal(sae(x), sae(x.float()))


def test_autocast(kind: type) -> None:
    sae, x = make(kind), tokens(64, D)
    exact = sae.loss(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert sae(x).dtype == torch.bfloat16
        out = sae.loss(x)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.fvu, exact.fvu, atol=0.02, rtol=0)
    out.loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in sae.parameters())


def test_compiled_forward_equals_eager(kind: type) -> None:
    sae = make(kind)
    compiled = torch.compile(sae, fullgraph=True, dynamic=True, backend="aot_eager")
    for N in (5, 9):
        x = tokens(N, D)
        torch.testing.assert_close(compiled(x), sae(x))
        torch.testing.assert_close(gradients(sae, compiled(x).sum()), gradients(sae, sae(x).sum()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(kind: type) -> None:
    sae, x = make(kind, dead_after=10), tokens(40, D)
    expected = sae.loss(x)
    sae.count_firings_(expected.code)
    moved = make(kind, dead_after=10).cuda()
    out = moved.loss(x.cuda())
    moved.count_firings_(out.code)
    torch.testing.assert_close(out.loss.cpu(), expected.loss)
    assert torch.equal(moved.tokens_since_fired.cpu(), sae.tokens_since_fired)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 8, 2), {}, ValueError, "d_model must be at least 1, got d_model=0"),
        ((4, 8, 0), {}, ValueError, "k must be at least 1, got k=0"),
        ((4, 8, 2.0), {}, TypeError, "k must be an int, got 2.0 of type float"),
        ((4, True, 1), {}, TypeError, "num_latents must be an int, got True"),
        ((4, 8, 2), {"aux_k": -1}, ValueError, "aux_k must be at least 0, got aux_k=-1"),
        ((4, 8, 2), {"dead_after": 0}, ValueError, "dead_after must be at least 1, got dead_after=0"),
        ((4, 8, 2), {"aux_weight": float("nan")}, ValueError, "aux_weight must be finite.*got nan"),
    ],
)
def test_bad_sizes(kind: type, arguments: tuple, options: dict, error: type, message: str) -> None:
    if message.startswith("k ") and kind not in (TopKSAE, MatchingPursuitSAE):
        pytest.skip("has no k, or one that may be a fraction")
    if kind in OPTIONS:
        arguments, options = arguments[:2], OPTIONS[kind] | options
    with pytest.raises(error, match=f"^{kind.__name__}: {message}"):
        kind(*arguments, **options)


def test_sizes_are_what_pytorch_takes_for_them(kind: type) -> None:
    sae = make(kind, d_model=np.int64(4), num_latents=torch.tensor(8), k=np.int32(2))
    assert (sae.d_model, sae.num_latents, getattr(sae, "k", 2)) == (4, 8, 2)
    assert sae(torch.ones(3, 4)).shape == (3, 4)


@pytest.mark.parametrize("method", ["encode", "forward", "loss", "init_decoder_bias_"])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        # would broadcast against b_dec
        (torch.ones(7, 1), ValueError, r"x must have shape \(..., D\) with D = 12, got shape \(7, 1\)"),
        (torch.ones(7, D, dtype=torch.int64), TypeError, "x must be float32, .*got int64"),
        ([[0.0] * D], TypeError, "x must be a torch.Tensor, got list"),
    ],
)
def test_bad_inputs(kind: type, method: str, x: object, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^{kind.__name__}.*{message}"):
        getattr(make(kind), method)(x)


def firing(index: int) -> TopK:
    return TopK(torch.ones(2, K), torch.full((2, K), index))


@pytest.mark.parametrize(
    ("method", "arguments", "options", "error", "message"),
    [
        ("init_decoder_bias_", [torch.ones(0, D)], {}, ValueError, "x must hold at least one token"),
        ("init_decoder_bias_", [torch.ones(2, D)], {"method": "x"}, ValueError, "method must be .*got 'x'"),
        ("decode", [torch.ones(2, K)], {}, TypeError, "indices must be given with values, got None"),
        (
            "count_firings_",
            [torch.ones(2, K)],
            {},
            TypeError,
            "code must be what encode or loss returned, got Tensor",
        ),
        (
            "count_firings_",
            [firing(0)],
            {"group": "x"},
            TypeError,
            "group must be a process group .*, got 'x'",
        ),
        ("count_firings_", [firing(-1)], {}, IndexError, r"indices\[0, 0\] must be in \[0, 40\), got -1"),
        ("count_firings_", [firing(M)], {}, IndexError, r"indices\[0, 0\] must be in \[0, 40\), got 40"),
    ],
)
def test_bad_arguments(
    kind: type, method: str, arguments: list, options: dict, error: type, message: str
) -> None:
    sae = make(kind)
    with pytest.raises(error, match=f"{method}: {message}"):
        getattr(sae, method)(*arguments, **options)
    assert not sae.tokens_since_fired.any()


def test_empty_batches(kind: type) -> None:
    sae = make(kind)
    assert sae(torch.ones(0, D)).shape == (0, D)
    with pytest.raises(ValueError, match="at least one token"):
        sae.loss(torch.ones(0, D))
