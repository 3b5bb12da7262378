"""EleutherAI's clt-training with our ops beneath it: the codes and gradients of dense maths.

It has no release: unreleased.py says what stands in for it, and how a checkout is tested instead.
"""

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from alike import EXACT, SINGLE, assert_alike, changed_by, gradients, in_order
from torch import Tensor, nn
from unreleased import unreleased

from fastsparse import compat
from fastsparse.compat import clt_training as adapter
from fastsparse.compat import sparsify as other_adapter
from fastsparse.compat._library import digest_of

LIBRARY = unreleased("clt_training", "sparsify", ("fused_encoder", "kernels", "sparse_coder", "utils"))
applied, with_and_without = LIBRARY.applied, LIBRARY.with_and_without
# The checkout's own, of the compiler and of devices that aren't there.
pytestmark = pytest.mark.filterwarnings("ignore") if LIBRARY.is_checkout else []

N, D, M, K = 24, 16, 96, 4
PRODUCTS = (
    "triton_sparse_dense_matmul",
    "triton_sparse_transpose_dense_matmul",
    "triton_dense_dense_sparseout_matmul",
)
OPTIONS = {
    "plain": {},
    "groupmax": {"activation": "groupmax"},
    "batchtopk": {"activation": "batchtopk"},
    "transcoder": {"transcode": True},
    "targets": {"transcode": True, "n_targets": 3},
    "normalize": {"normalize_io": True},
}
every_coder = pytest.mark.parametrize("kind", OPTIONS)
every_activation = pytest.mark.parametrize("activation", ["topk", "groupmax", "batchtopk"])


@pytest.fixture(autouse=True)
def unpatched(monkeypatch):
    monkeypatch.setattr(adapter.LIBRARY, "least_work", adapter.LIBRARY.least_work)
    with LIBRARY.imported():
        yield
        adapter.undo()


def tokens(*leading: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(leading or (N,)), D, generator=generator, dtype=torch.float64).to(dtype)


def leaves(dtype: torch.dtype = torch.float64, bias: bool = True) -> list[Tensor | None]:
    """x, weight, bias, atoms."""
    made = [
        tokens(dtype=dtype),
        tokens(M, seed=1, dtype=dtype),
        tokens(M, seed=2, dtype=dtype)[:, 0].clone() if bias else None,
        tokens(M, seed=3, dtype=dtype),
    ]
    return [leaf if leaf is None else leaf.requires_grad_() for leaf in made]


def grads(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [tensor if tensor is None else tensor.grad for tensor in tensors]


def dense_code(acts: Tensor, indices: Tensor) -> Tensor:
    """Where several are 0, anyone may be picked: that says nothing."""
    return acts.new_zeros(len(acts), M).scatter_add(1, indices, acts)


def coder(library: SimpleNamespace, kind: str = "plain", dtype: torch.dtype = torch.float64, **options):
    module = library.sparse_coder
    cfg = module.SparseCoderConfig(num_latents=M, k=K, **OPTIONS[kind], **options)
    made = module.SparseCoder(D, cfg, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(made.named_parameters()):
        if name.startswith(("encoder", "W_dec", "b_dec")):
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(values * (0.1 if "b" in name.split(".")[-1] else 1))
    if cfg.normalize_io:
        made.in_norm.fill_(3.5)
    return made


def refusals() -> set[str]:
    return {why for _, why in adapter.status().refused}


# Encoder and decoder.


@every_activation
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_encoder_and_decoder(activation, bias, dtype):
    def run(library):
        made = leaves(dtype, bias)
        x, weight, b, atoms = made
        out = library.fused_encoder.fused_encoder(x, weight, b, K, activation)
        assert type(out) is library.fused_encoder.EncoderOutput
        decoded = library.utils.decoder_impl(out.top_indices, out.top_acts, atoms)
        decoded.pow(3).sum().backward()
        assert out.top_indices.dtype == torch.int64
        return dense_code(*out), out.top_acts.shape, decoded, grads(made)

    without, ours = with_and_without(run)
    assert_alike(ours, without, EXACT if dtype == torch.float64 else SINGLE)


def test_groups_come_in_their_order():
    def run(library):
        return tuple(library.fused_encoder.fused_encoder(*leaves()[:3], K, "groupmax"))

    assert_alike(*reversed(with_and_without(run)))


@every_activation
def test_picks_of_value_zero_have_no_gradient(activation):
    def run(library):
        x, weight, bias, _ = made = leaves()
        bias.data.sub_(7)
        out = library.fused_encoder.fused_encoder(x, weight, bias, K, activation)
        assert (out.top_acts == 0).any()
        assert (out.top_acts > 0).any()
        (dense_code(*out) + out.top_acts.sum()).square().sum().backward()
        return dense_code(*out), grads(made)

    assert_alike(*reversed(with_and_without(run)))


def test_batches_keep_at_most_four_times_k_of_a_token():
    def run(library):
        x, weight, bias, _ = made = leaves()
        x.data[0] *= 100  # it would have nearly all
        out = library.fused_encoder.fused_encoder(x, weight, bias, K, "batchtopk")
        counts = (out.top_acts > 0).sum(dim=1)
        out.top_acts.square().sum().backward()
        return counts, dense_code(*out), grads(made)

    without, ours = with_and_without(run)
    assert_alike(ours, without)
    assert ours[0][0] == 4 * K
    assert ours[0].sum() == K * N


def test_what_equals_the_last_of_a_batch_is_kept():
    def run(library):
        x, weight, bias, _ = (leaf.detach().round() for leaf in leaves())  # so that ties are exact
        x[1:] = x[0]
        weight, bias = (part[::3].repeat_interleave(3, dim=0) for part in (weight, bias))
        return dense_code(*library.fused_encoder.fused_encoder(x, weight, bias, K, "batchtopk"))

    without, ours = with_and_without(run)
    assert_alike(ours, without)
    assert (ours > 0).sum() > K * N


def test_products():
    generator = torch.Generator().manual_seed(0)
    values, indices = torch.rand(N, M, generator=generator, dtype=torch.float64).topk(K)

    def run(library):
        products = [getattr(library.kernels, name) for name in PRODUCTS]
        atoms = tokens(M, seed=1)
        return (
            products[0](indices, values, atoms),
            products[1](indices, values, tokens(), M),
            products[2](tokens(), atoms.T, indices),
        )

    assert_alike(*reversed(with_and_without(run)))


def test_autocast():
    def run(library):
        made = leaves(torch.float32)
        x, weight, bias, _ = made
        with torch.autocast("cpu", torch.bfloat16):
            out = library.fused_encoder.fused_encoder(x, weight, bias, K, "topk")
        acts, indices = in_order(*out)
        return made, acts, indices

    (made, acts, indices), (made_, acts_, indices_) = with_and_without(run)
    grad = tokens(N, seed=7, dtype=torch.bfloat16).float()[:, :K]  # as it comes through bfloat16
    assert acts_.dtype == acts.dtype == torch.bfloat16
    same = (indices == indices_).all(dim=1, keepdim=True)  # but for ties in bfloat16
    assert same.float().mean() > 0.7
    assert_alike((acts_ * same).detach(), (acts * same).detach(), 0.02)
    (acts_.float() * grad * same).sum().backward()
    # The gradients of dense maths, were its products not rounded: ours stay in the weight's precision.
    x, weight, bias, _ = made
    (torch.relu(x @ weight.T + bias).gather(1, indices) * grad * same).sum().backward()
    assert_alike(grads(made_[:3]), grads(made[:3]), SINGLE)


@every_coder
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_coder(kind, dtype):
    def run(library):
        sae, x = coder(library, kind, dtype), tokens(dtype=dtype).requires_grad_()
        out = sae.encode(x)
        decoded = sae.decode(*out)
        if kind == "targets":
            decoded = decoded + 2 * sae.decode(*out, 1) + 3 * sae.decode(*out, index=2)
        decoded.pow(2).sum().backward()
        wanted = {name: grad for name, grad in gradients(sae).items() if grad is not None}
        return dense_code(*out), decoded, x.grad, wanted

    without, ours = with_and_without(run)
    assert_alike(ours, without, EXACT if dtype == torch.float64 else SINGLE)
    for name in ("encode", "decode"):
        assert adapter.status().served[f"sparsify.sparse_coder.SparseCoder.{name}"]


@every_coder
def test_training(kind):
    def run(library):
        sae = coder(library, kind)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
        losses = []
        for step in range(20):
            x = tokens(seed=step)
            loss = (sae.decode(*sae.encode(x)) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, {name: p for name, p in sae.named_parameters() if p.grad is not None}

    without, ours = with_and_without(run)
    assert_alike(ours, without, 1e-7)
    assert len(set(without[0])) == 20


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes(mode):
    def run(library):
        with mode():
            sae = coder(library)
            return sae.decode(*sae.encode(tokens())) + 0

    assert_alike(*reversed(with_and_without(run)))


# What is refused.


class Distributed(Tensor):
    """A tensor of another kind."""


def outcome(call: Callable, *arguments):
    try:
        return call(*arguments)
    except Exception as error:
        return type(error)


def encoder_of(k: int, activation: str = "topk", change: Callable = lambda x: x, **options) -> Callable:
    def call(library):
        x, weight, bias, _ = (leaf.detach() for leaf in leaves())
        return library.fused_encoder.fused_encoder(change(x), weight, bias, k, activation, **options)

    return call


def decoder_of(acts: Callable, indices: Tensor) -> Callable:
    return lambda library: library.utils.decoder_impl(indices, acts(tokens()), tokens(M))


def without_decoder(library):
    sae = coder(library)
    sae.W_dec = None
    return sae.decode(torch.ones(N, 2).double(), torch.zeros(N, 2).long())


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (encoder_of(K, use_fp8=True), "fp8"),
        (encoder_of(25), "k > M / 4"),
        (encoder_of(7, "batchtopk"), "k > M / 4"),
        (encoder_of(0), "k < 1"),
        (encoder_of(5, "groupmax"), "groups of different sizes"),
        (encoder_of(K, "other"), "activation is unknown"),
        (encoder_of(K, change=lambda x: x[None]), "input is not (N, D)"),
        (encoder_of(K, change=Tensor.float), "dtypes differ"),
        (encoder_of(K, change=lambda x: x.as_subclass(Distributed)), "a Distributed, no plain tensor"),
        (encoder_of(K, "batchtopk", change=lambda x: x[:0]), "no batch"),
        (decoder_of(lambda x: x[:, :2].float(), torch.zeros(N, 2).long()), "dtypes differ"),
        (decoder_of(lambda x: x[0, :2], torch.zeros(2).long()), "acts and indices are not (N, k)"),
        (without_decoder, "no decoder"),
    ],
)
def test_refused(call, why):
    right = outcome(call, LIBRARY.dense)
    with applied():
        found = outcome(call, LIBRARY.tested)
    if not LIBRARY.is_checkout:  # whose own kernels need a GPU
        assert_alike(found, right)
    assert why in refusals()
    with applied(on_refuse="raise"), pytest.raises(RuntimeError, match="served by the library's own"):
        call(LIBRARY.tested)


def test_no_work_is_too_little_on_a_cpu():
    sae = coder(LIBRARY.tested)
    with applied(on_refuse="raise", least_work=1 << 40):
        before = sum(adapter.status().served.values())
        sae.decode(*sae.encode(tokens()))
        assert sum(adapter.status().served.values()) > before


# Which of the two it is.


def as_if_eai() -> None:
    def fused_encoder(input, weight, bias, k, activation):
        raise AssertionError

    for name in LIBRARY.tested.all:
        del sys.modules[name]
    package, other = types.ModuleType("sparsify"), types.ModuleType("sparsify.fused_encoder")
    other.fused_encoder = fused_encoder
    sys.modules |= {"sparsify": package, "sparsify.fused_encoder": other}


def test_the_other_library_of_this_name():
    as_if_eai()
    for force in (False, True):
        with pytest.raises(
            RuntimeError, match=r"must be clt-training, got eai-sparsify, which fastsparse.compat.sparsify"
        ):
            adapter.apply(force=force)


def test_the_other_adapter_points_here():
    for force in (False, True):
        with pytest.raises(
            RuntimeError,
            match=r"must be eai-sparsify, got clt-training, which fastsparse.compat.clt_training",
        ):
            other_adapter.apply(force=force)


def test_the_one_that_is_imported_is_taken(monkeypatch):
    monkeypatch.setattr(compat, "LIBRARIES", ("clt_training", "sparsify"))
    assert compat._libraries() == [adapter.LIBRARY]
    with compat.apply(force=True):
        assert adapter.status().applied
        assert not other_adapter.status().applied
        assert compat._libraries() == [adapter.LIBRARY]
    as_if_eai()
    assert compat._libraries() == [other_adapter.LIBRARY]


def test_not_to_be_imported():
    for name in LIBRARY.tested.all:
        del sys.modules[name]
    sys.modules["sparsify"] = None
    with pytest.raises(ModuleNotFoundError, match=r"a clone of https://github\.com/EleutherAI/clt-training"):
        adapter.apply()
    assert adapter.status().version is None


# Applied and undone.


def test_undo_leaves_nothing():
    changed = changed_by("sparsify", applied)
    # Also where they are imported by name.
    for name in ("fused_encoder.fused_encoder", "sparse_coder.fused_encoder"):
        assert f"sparsify.{name}" in changed
    for name in ("utils.decoder_impl", "sparse_coder.decoder_impl"):
        assert f"sparsify.{name}" in changed


def test_what_isnt_the_commit_that_was_tested():
    LIBRARY.assert_told_by_its_functions()


@every_coder
def test_convert(monkeypatch, kind):
    def found(site):
        return replace(site, digest=digest_of(adapter.LIBRARY._current(site)))

    monkeypatch.setattr(adapter.LIBRARY, "sites", tuple(map(found, adapter.LIBRARY.sites)))
    sae = coder(LIBRARY.tested, kind)
    right = coder(LIBRARY.dense, kind)
    assert adapter.convert(sae) is sae
    before = sum(adapter.status().served.values())
    assert_alike(sae.decode(*sae.encode(tokens())), right.decode(*right.encode(tokens())))
    assert sum(adapter.status().served.values()) == before + 2
    with pytest.raises(TypeError, match="module must be of a class that is served"):
        adapter.convert(nn.Linear(1, 1))
