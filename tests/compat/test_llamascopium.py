"""llamascopium with our ops beneath it and without: the same activations, losses, gradients."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import alike
import pytest
import torch
from alike import EXACT, SINGLE, assert_alike, attributes, gradients
from torch import Tensor, nn

from benchmarks.peers.llamascopium import stand_in_for_the_package

try:
    stand_in_for_the_package()
except ModuleNotFoundError:
    pytest.skip("llamascopium is not installed: make peers-test", allow_module_level=True)

with warnings.catch_warnings(action="ignore"):  # of its autocast for CUDA, where there is none
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

from fastsparse.codes import code_of
from fastsparse.compat import llamascopium as adapter

unpatched = alike.unpatched(adapter)
with_and_without, refusals = partial(alike.with_and_without, adapter), partial(alike.refusals, adapter)
served, assert_refused = partial(alike.served, adapter), partial(alike.assert_refused, adapter)
N, D, M, K = 24, 16, 96, 4
KINDS = ("relu", "jumprelu", "topk", "batchtopk")
ENCODE, DECODE, COO = (f"SparseAutoEncoder.{name}" for name in ("encode", "decode", "decode_coo"))
SPMM = "decode_with_triton_spmm_kernel"
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
by_norm = pytest.mark.parametrize("norms", [True, False])


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (N, D)), generator=generator, dtype=torch.float64).to(dtype)


def sae(kind: str = "topk", norms: bool = True, dtype: torch.dtype = torch.float64, **options):
    """Of which few latents are active; atoms of all norms."""
    config = SAEConfig(
        hook_point_in="in", hook_point_out="out", d_model=D, expansion_factor=M / D, act_fn=kind,
        sparsity_include_decoder_norm=norms, dtype=dtype,
        **{"top_k": K, "jumprelu_threshold_window": 0.2} | options,
    )  # fmt: skip
    made = SparseAutoEncoder(config)
    for seed, (name, parameter) in enumerate(made.named_parameters(), start=50):
        parameter.data = tokens(*parameter.shape, seed=seed, dtype=dtype) / D**0.5
        if "threshold" in name:
            parameter.data = (parameter.data / 4 + (math.log(1.6) if norms else 0.55)).to(dtype)
    if kind == "relu":
        made.b_E.data -= 1.7
    return made


def within(dtype: torch.dtype) -> float:
    return EXACT if dtype == torch.float64 else SINGLE


@every_kind
@by_norm
@every_dtype
@pytest.mark.parametrize("shape", [(N, D), (2, 12, D)], ids=str)
def test_a_step(kind, norms, dtype, shape):
    def run():
        made, x = sae(kind, norms, dtype), tokens(*shape, dtype=dtype).requires_grad_()
        acts, hidden_pre = made.encode(x, return_hidden_pre=True)
        out = made.decode(acts)
        (out.pow(3).sum() + acts.square().sum()).backward()
        return acts, hidden_pre.detach() + 0, out, made.encode(x), x.grad, gradients(made)

    without, ours = with_and_without(run)
    assert_alike(ours, without, within(dtype))
    assert 1 < (without[0] != 0).sum() / N < M / 8
    assert (served(ENCODE), served(DECODE)) == (2, 1)
    assert kind != "jumprelu" or without[5]["activation_function.log_jumprelu_threshold"].any()


@every_dtype
@by_norm
def test_thresholds_get_gradients_from_activations_of_0(dtype, norms):
    """Of latents that are off within the band about their thresholds."""

    def run():
        made = sae("jumprelu", norms, dtype)
        acts = made.encode(tokens(dtype=dtype))
        loss = (acts * tokens(N, M, seed=3, dtype=dtype)).sum()
        return acts, torch.autograd.grad(loss, made.activation_function.log_jumprelu_threshold)[0]

    without, ours = with_and_without(run)
    assert_alike(ours, without, within(dtype))
    assert without[1].any()


def test_a_band_that_reaches_below_0():
    """There is a gradient of thresholds by positive pre-activations alone."""

    def run():
        made = sae("jumprelu", False, jumprelu_threshold_window=8.0)
        made.b_E.data -= 1.5
        x = tokens().requires_grad_()
        made.decode(made.encode(x)).square().sum().backward()
        return x.grad, gradients(made)

    without, ours = with_and_without(run)
    assert_alike(ours, without)
    assert without[1]["activation_function.log_jumprelu_threshold"].any()


LOSSES = {
    "plain": {},
    "power": {"sparsity_loss_type": "power"},
    "tanh": {"sparsity_loss_type": "tanh"},
    "aux": {"auxk_coefficient": 1 / 32, "k_aux": 6},
    "lp": {"lp_coefficient": 0.1},
}


@every_kind
@pytest.mark.parametrize("loss", LOSSES)
@by_norm
@every_dtype
def test_loss(kind, loss, norms, dtype):
    options = dict(LOSSES[loss])
    if loss == "aux":
        options["update_dead_statistics"] = lambda *_: torch.arange(M) < 30

    def run():
        made, x = sae(kind, norms, dtype), tokens(dtype=dtype)
        batch = {"in": x, "out": x.roll(1, 1), "tokens": torch.arange(N)}
        found = made.compute_loss(batch, **options)
        found["loss"].backward()
        told = {name: found[name] for name in ("loss", "feature_acts", "reconstructed")}
        return told, found["hidden_pre"].detach() + 0, made.current_k, gradients(made)

    without, ours = with_and_without(run)
    assert_alike(ours, without, within(dtype) * (10 if dtype == torch.float32 else 1))


@every_kind
@every_dtype
def test_training(kind, dtype):
    def run():
        made, losses = sae(kind, dtype=dtype), []
        optimizer = torch.optim.Adam(made.parameters(), lr=1e-3)
        for step in range(15):
            x = tokens(seed=step, dtype=dtype)
            made.set_current_k(K + (step < 5))
            loss = made.compute_loss({"in": x, "out": x, "tokens": x}, return_aux_data=False)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, made.state_dict()

    without, ours = with_and_without(run)
    assert_alike(ours, without, 1e-7 if dtype == torch.float64 else 1e-3)
    assert served(ENCODE) == served(DECODE) == 15


@every_kind
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_modes(kind, mode):
    def run():
        with mode():
            made = sae(kind)
            return made(tokens()) + 0

    assert_alike(*reversed(with_and_without(run, "fallback")))
    assert served(ENCODE) == 1


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_autocast(kind):
    def run():
        made, x = sae(kind, dtype=torch.float32), tokens(200, D, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            acts = made.encode(x)
            out = made.decode(acts)
        out.square().sum().backward()
        return acts, out, gradients(made)

    (acts, out, grads), (acts_, out_, grads_) = with_and_without(run)
    assert (acts_.dtype, out_.dtype) == (acts.dtype, out.dtype)
    same = ((acts != 0) == (acts_ != 0)).all(dim=1)
    assert same.float().mean() > 0.6
    assert_alike(acts_[same], acts[same], 0.02)
    assert_alike(out_[same], out[same], 0.02)
    for name, grad in grads.items():
        assert grads_[name].dtype == grad.dtype
        assert grads_[name].sub(grad).norm() < 0.3 * grad.norm()


def test_half_precision():
    def run():
        with torch.no_grad():
            made, x = sae(dtype=torch.bfloat16), tokens(200, D, dtype=torch.bfloat16)
            acts = made.encode(x)
            return acts, made.decode(acts)

    (acts, out), (acts_, out_) = with_and_without(run)
    same = ((acts != 0) == (acts_ != 0)).all(dim=1)
    assert same.float().mean() > 0.6
    assert acts_.dtype == acts.dtype == torch.bfloat16
    assert_alike(acts_[same], acts[same], 0.03)
    assert_alike(out_[same], out[same], 0.03)


def test_pre_activations_are_not_made():
    with adapter.apply(least_work=0, on_refuse="raise"):
        acts, hidden_pre = sae().encode(tokens(), return_hidden_pre=True)
        assert hidden_pre.computed is None
        assert code_of(acts) is not None


@every_kind
def test_hooks_on_activations_and_outputs_are_called(kind):
    def run():
        made, seen = sae(kind), []

        def doubled(tensor, hook):
            seen.append(tensor.detach() + 0)
            return 2 * tensor

        for point in (made.hook_feature_acts, made.hook_reconstructed):
            point.add_hook(doubled)
        made.hook_feature_acts.add_hook(lambda grad, hook: seen.append(grad + 0), dir="bwd")
        out = made(tokens().requires_grad_())
        out.square().sum().backward()
        return out, seen, gradients(made)

    without, ours = with_and_without(run, "fallback")
    assert_alike(ours, without)
    assert len(without[1]) == 3


@every_dtype
@pytest.mark.parametrize("bias", [True, False])
def test_decode_coo(dtype, bias):
    def run():
        made = sae(dtype=dtype, use_decoder_bias=bias)
        with torch.no_grad():
            acts = made.encode(tokens(dtype=dtype)).to_sparse()
        values = acts.values().requires_grad_(dtype == torch.float32)  # else its own conversion has none
        acts = torch.sparse_coo_tensor(
            acts.indices(), values, acts.shape, is_coalesced=True, check_invariants=False
        )
        out = made.decode_coo(acts)
        out.pow(3).sum().backward()
        return out, values.grad, gradients(made)

    assert_alike(*reversed(with_and_without(run)), SINGLE)
    assert served(COO) == 1


# The product by a kernel, which runs on GPUs alone.


@every_dtype
def test_product(dtype):
    """That of its kernel: no gradient of the activations where these are 0."""
    entrypoints = pytest.importorskip("llamascopium.kernels.entrypoints", reason="Triton is not installed")
    acts = torch.where(tokens(N, M, dtype=dtype) > 1.5, tokens(N, M, seed=1, dtype=dtype), 0).requires_grad_()
    weight = tokens(M, D, seed=2, dtype=dtype).requires_grad_()
    right = acts @ weight
    right.pow(3).sum().backward()
    grads = [(acts != 0) * acts.grad, weight.grad]
    assert not grads[0].equal(acts.grad)
    acts.grad = weight.grad = None
    with adapter.apply(least_work=0, on_refuse="raise"):
        out = entrypoints.decode_with_triton_spmm_kernel(acts, weight)
        out.pow(3).sum().backward()
    assert_alike(out, right, within(dtype))
    assert_alike([acts.grad, weight.grad], grads, within(dtype))
    assert served(SPMM) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the library's kernels are for GPUs")
@pytest.mark.gpu
def test_product_is_its_kernels():
    from llamascopium.kernels import entrypoints

    def run():
        acts = torch.where(tokens(N, M) > 1.5, tokens(N, M, seed=1), 0).float().cuda().requires_grad_()
        weight = tokens(M, D, seed=2, dtype=torch.float32).cuda().requires_grad_()
        out = entrypoints.decode_with_triton_spmm_kernel(acts, weight)
        out.pow(3).sum().backward()
        return out, acts.grad, weight.grad

    assert_alike(*reversed(with_and_without(run)), SINGLE)


# What is refused.


def encode(made, x):
    return made.encode(x)


def set_to(name: str, value) -> Callable:
    return lambda made: setattr(made, name, value)


def hooked(made) -> None:
    made.hook_hidden_pre.add_hook(lambda *_, **__: None)


def dead(made) -> None:
    made.W_D.data[3] = 0


def under_autocast(made, x):
    with torch.autocast("cpu", torch.bfloat16):
        return made.encode(x.bfloat16())


class Other(Tensor):
    pass


REFUSED = {
    "hooks": ("topk", {}, hooked, encode),
    "hook points that aren't known": ("topk", {}, set_to("hook_hidden_pre", nn.Identity()), encode),
    "a gated encoder": ("topk", {"use_glu_encoder": True}, None, encode),
    "an atom of norm 0": ("topk", {}, dead, encode),
    "k > M / 4": ("topk", {"top_k": 25}, None, encode),
    "k below 1, or no whole number": ("topk", {}, set_to("current_k", 0), encode),
    "codes are not sparse": ("relu", {}, lambda made: made.b_E.data.add_(2), encode),
    "an activation function that isn't known": ("topk", {}, set_to("activation_function", len), encode),
    "the activation function of another autoencoder": (
        "topk", {}, lambda made: setattr(made, "activation_function", sae().activation_function), encode,
    ),
    "a window that isn't above 0": ("jumprelu", {"jumprelu_threshold_window": 0.0}, None, encode),
    "a threshold is NaN": (
        "jumprelu", {}, lambda made: made.activation_function.log_jumprelu_threshold.data.fill_(torch.nan),
        encode,
    ),
    "autocast of parameters of half precision": ("topk", {"dtype": torch.bfloat16}, None, under_autocast),
    "the shape of the input": ("topk", {}, None, lambda made, x: made.encode(x[0])),
    "a Other, no plain tensor": ("topk", {}, None, lambda made, x: made.encode(x.as_subclass(Other))),
    "activations: not made of a code": ("topk", {}, None, lambda made, x: made.decode(x.repeat(1, 6))),
    "activations that aren't sparse, or not coalesced": (
        "topk", {}, None, lambda made, x: made.decode_coo(x.repeat(1, 6)),
    ),
    "the shape of the activations": ("topk", {}, None, lambda made, x: made.decode_coo(x.to_sparse())),
}  # fmt: skip


def outcome(kind, options, change, call):
    made = sae(kind, **options)
    if change is not None:
        change(made)
    try:
        found = call(made, tokens())
    except (RuntimeError, IndexError, AssertionError, ValueError) as error:
        return type(error).__name__, str(error)
    found = found.detach().as_subclass(Tensor)
    return "found", found.nan_to_num(7)


@pytest.mark.parametrize("why", REFUSED)
def test_refused(why):
    assert_refused(why, lambda: outcome(*REFUSED[why]))


def test_dtensors_are_refused():
    with adapter.apply(least_work=0, on_refuse="raise"):
        made = sae()
        made.device_mesh = object()
        for call in (made.encode, made.decode_coo):
            with pytest.raises(RuntimeError, match="served by the library's own code: DTensor"):
                call(tokens())


def test_its_kernel_is_refused():
    """Which it hands the decoder the other way round than its kernel takes it."""
    made = sae(use_triton_kernel=True, sparsity_threshold_for_triton_spmm_kernel=1.0)
    right = made(tokens())
    with adapter.apply(least_work=0):
        assert_alike(made(tokens()), right)
    assert "its Triton kernel is asked for" in refusals()


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("the decoder is not (M, D)", lambda acts, weight: (acts, weight.T.contiguous())),
        ("activations that aren't a dense matrix", lambda acts, weight: (acts.to_sparse(), weight)),
        ("dtypes differ", lambda acts, weight: (acts.float(), weight)),
        ("a Other, no plain tensor", lambda acts, weight: (acts.as_subclass(Other), weight)),
    ],
)
def test_products_that_are_refused(why, change):
    entrypoints = pytest.importorskip("llamascopium.kernels.entrypoints", reason="Triton is not installed")
    with (
        adapter.apply(least_work=0, on_refuse="raise"),
        pytest.raises(RuntimeError) as error,
    ):
        entrypoints.decode_with_triton_spmm_kernel(*change(tokens(N, M), tokens(M, D)))
    assert f"served by the library's own code: {why}" in str(error.value)


def test_little_work_is_the_librarys_own():
    with adapter.apply():
        sae()(tokens())
    assert "little work" in refusals()


def test_errors_are_the_librarys_own():
    with pytest.raises(RuntimeError) as theirs:
        sae().encode(tokens(N, D + 1))
    with adapter.apply(least_work=0), pytest.raises(RuntimeError) as ours:
        sae().encode(tokens(N, D + 1))
    assert str(ours.value) == str(theirs.value)


# Applied and undone.


def test_undo_leaves_nothing():
    before = attributes("llamascopium")
    with adapter.apply():
        patched = attributes("llamascopium")
        changed = {name for name in before if patched[name] is not before[name]}
        assert len(changed) >= len(adapter.LIBRARY.sites)
        assert adapter.status().applied
    after = attributes("llamascopium")
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


@every_kind
def test_convert(kind):
    made, other = sae(kind), sae(kind)
    right = other(tokens())
    adapter.LIBRARY.least_work = 0
    assert adapter.convert(made) is made
    assert_alike(made(tokens()), right)
    assert (served(ENCODE), served(DECODE)) == (1, 1)
    other(tokens())
    assert (served(ENCODE), served(DECODE)) == (1, 1)


def test_copies_and_pickles():
    """A copy's TopK is that of the autoencoder that it is a copy of; ReLU and JumpReLU are its own."""
    with adapter.apply(least_work=0):
        made = sae("jumprelu")
        assert_alike(copy.deepcopy(made)(tokens()), made(tokens()))
        assert_alike(pickle.loads(pickle.dumps(made))(tokens()), made(tokens()))
        assert not refusals()
        made = sae("topk")
        again = copy.deepcopy(made)
        made.set_current_k(K + 2)
        assert_alike(again(tokens()), made(tokens()))
        assert "the activation function of another autoencoder" in refusals()


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_compiled_it_is_the_librarys_own():
    made, x = sae(), tokens()
    right = made.decode(made.encode(x))
    with adapter.apply(least_work=0, on_refuse="raise"):
        torch._dynamo.reset()
        assert_alike(torch.compile(lambda x: made.decode(made.encode(x)), backend="eager")(x), right)
        assert not adapter.status().served
