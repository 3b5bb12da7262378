"""EleutherAI's sparsify with our ops beneath it and without: the same codes, losses, gradients, training."""

import contextlib
import copy
import io
import os
import pickle
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib import metadata

import alike
import pytest
import torch
from alike import (
    EXACT,
    SINGLE,
    STEPS,
    D,
    K,
    M,
    N,
    assert_alike,
    changed_by,
    gradients,
    in_order,
    tokens,
)  # fmt: skip
from torch import Tensor

try:
    metadata.version("eai-sparsify")
except metadata.PackageNotFoundError:
    pytest.skip("eai-sparsify is not installed", allow_module_level=True)

if not torch.cuda.is_available():
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its decoder for CPUs
with contextlib.redirect_stdout(io.StringIO()):  # it prints which decoder it chose
    sparsify = pytest.importorskip("sparsify", reason="sparsify can't be imported", exc_type=ImportError)
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify import fused_encoder as encoding
    from sparsify import utils as decoding

from fastsparse.compat import sparsify as adapter

unpatched = alike.unpatched(adapter)
with_and_without, refusals = partial(alike.with_and_without, adapter), partial(alike.refusals, adapter)

OPTIONS = {
    "plain": {},
    "groupmax": {"activation": "groupmax"},
    "multi_topk": {"multi_topk": True},
    "transcoder": {"transcode": True},
    "skip": {"transcode": True, "skip_connection": True, "multi_topk": True},
}
every_coder = pytest.mark.parametrize("kind", OPTIONS)


def coder(kind: str = "plain", dtype: torch.dtype = torch.float64, **options) -> SparseCoder:
    torch.manual_seed(1)
    made = SparseCoder(D, SparseCoderConfig(num_latents=M, k=K, **OPTIONS[kind], **options), dtype=dtype)
    for parameter in (made.encoder.bias, made.b_dec, made.W_skip):
        if parameter is not None:
            parameter.data.normal_(std=0.1)
    if OPTIONS[kind].get("transcode"):
        made.W_dec.data.normal_()
    return made


# Encoder and decoder.


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_encoder_and_decoder(activation, bias, dtype):
    def run():
        leaves = {
            "x": tokens(dtype=dtype),
            "weight": tokens(M, seed=1, dtype=dtype),
            "bias": tokens(M, seed=2, dtype=dtype)[:, 0].clone() if bias else None,
            "atoms": tokens(M, seed=3, dtype=dtype),
        }
        leaves = {
            name: leaf if leaf is None else leaf.detach().clone().requires_grad_()
            for name, leaf in leaves.items()
        }
        x, weight, b, atoms = leaves.values()
        out = encoding.fused_encoder(x, weight, b, K, activation)
        assert type(out) is encoding.EncoderOutput
        decoded = decoding.decoder_impl(out.top_indices, out.top_acts, atoms.mT)
        decoded.pow(3).sum().backward()
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}
        return in_order(out.top_acts, out.top_indices), out.pre_acts, decoded, grads

    double = dtype == torch.float64
    without, ours = with_and_without(run)
    assert_alike(ours, without, EXACT if double else SINGLE)


def test_groups_come_in_their_order():
    def run():
        return tuple(coder("groupmax").encode(tokens()))

    assert_alike(*reversed(with_and_without(run)))


def test_leading_dimensions_where_the_library_takes_them():
    for leading in ((), (3,), (2, 3), (2, 1, 3)):

        def run(leading=leading):
            with torch.no_grad():
                out = coder().encode(tokens(*leading) if leading else tokens(1)[0])
                return in_order(*out[:2]), out.pre_acts

        assert_alike(*reversed(with_and_without(run)))


def test_gradient_passes_picks_of_value_zero():
    x, weight, bias = tokens(), tokens(M, seed=1), -tokens(M, seed=2)[:, 0].abs() - 11
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
    with adapter.apply(least_work=0, on_refuse="raise"):
        acts, indices, _ = encoding.fused_encoder(x, weight, bias, K, "topk")
        grad = tokens(N, seed=4)[:, :K]
        assert (acts == 0).any()
        ours = torch.autograd.grad(acts, (x, weight, bias), grad)
    # The same by plain PyTorch, had the picks no ReLU.
    straight = (x @ weight.T + bias).gather(1, indices)
    assert_alike(ours, torch.autograd.grad(straight, (x, weight, bias), grad))
    assert (straight <= 0).any()


def test_values_where_fewer_are_positive_than_k():
    def run():
        sae = coder()
        sae.encoder.bias.data -= 1.5
        out = sae.encode(tokens())
        return out.top_acts.sort(dim=1).values.detach(), out.pre_acts.detach(), sae.decode(*out[:2]).detach()

    without, ours = with_and_without(run)
    assert_alike(ours, without)
    assert (without[0] == 0).any()


def test_no_gradient_by_pre_activations():
    def run():
        sae, source = coder(), tokens().requires_grad_()
        pre = sae.encode(source).pre_acts
        assert pre.requires_grad
        pre.square().sum().backward()
        return source.grad, gradients(sae)

    without, ours = with_and_without(run)
    assert_alike(ours, without)
    assert not ours[1]["encoder.weight"].any()


# Forward.


@every_coder
@pytest.mark.parametrize("dead", [None, 0, 3, 60])
@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("term", ["fvu", "all"])
def test_forward(kind, dead, target, term):
    def run():
        sae, source = coder(kind), tokens().requires_grad_()
        mask = None if dead is None else torch.arange(M) < dead
        y = tokens(seed=5) if target else None
        out = sae(source, y, dead_mask=mask)
        loss = out.fvu if term == "fvu" else out.fvu + out.auxk_loss / 3 + out.multi_topk_fvu / 5
        loss.backward()
        latents = in_order(out.latent_acts.detach(), out.latent_indices)
        return out.sae_out, latents, out.fvu, out.auxk_loss, out.multi_topk_fvu, source.grad, gradients(sae)

    assert_alike(*reversed(with_and_without(run)))


def trained(kind: str, dtype: torch.dtype, steps: range, state: dict | None = None) -> dict:
    """The losses of these steps, and all that a run goes on from."""
    sae = coder(kind, dtype)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    since, losses = torch.zeros(M, dtype=torch.int64), []
    if state is not None:
        sae.load_state_dict(state["sae"])
        optimizer.load_state_dict(state["optimizer"])
        since = state["since"].clone()
    for step in steps:
        if not sae.cfg.transcode:
            sae.set_decoder_norm_to_unit_norm()
        x = tokens(seed=step, dtype=dtype)
        out = sae(x, x.roll(1, 1) if sae.cfg.transcode else None, dead_mask=since > 2)
        loss = out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8
        optimizer.zero_grad()
        loss.backward()
        if not sae.cfg.transcode:
            sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        since += 1
        since[out.latent_indices.flatten()] = 0
        losses.append(loss.item())
    return {"losses": losses, "sae": sae.state_dict(), "optimizer": optimizer.state_dict(), "since": since}


@every_coder
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_training(kind, dtype):
    double = dtype == torch.float64
    steps = range(STEPS if double else 20)  # in single precision picks begin to differ

    def run():
        found = trained(kind, dtype, steps)
        return found, {name: tensor.stride() for name, tensor in found["sae"].items()}

    without, ours = with_and_without(run)
    assert_alike(ours, without, 1e-7 if double else 1e-3)
    assert len(set(without[0]["losses"])) == len(steps)
    counts = adapter.status().served
    assert counts["sparsify.sparse_coder.SparseCoder.encode"] >= len(steps)
    assert counts["sparsify.sparse_coder.SparseCoder.decode"] >= len(steps)


@every_coder
@pytest.mark.parametrize("ours_first", [False, True])
def test_a_run_that_changes_sides(kind, ours_first):
    sides = [lambda: adapter.apply(least_work=0, on_refuse="raise"), nullcontext]
    first, last = sides if ours_first else reversed(sides)
    with first():
        half = trained(kind, torch.float64, range(STEPS // 2))
    with last():
        found = trained(kind, torch.float64, range(STEPS // 2, STEPS), half)
    found["losses"] = half["losses"] + found["losses"]
    assert_alike(found, trained(kind, torch.float64, range(STEPS)), 1e-7)


def test_pre_activations_are_not_made():
    sae = coder("multi_topk")
    with adapter.apply(least_work=0, on_refuse="raise"):
        pre = sae.encode(tokens()).pre_acts
        torch.where(torch.ones(1, M, dtype=torch.bool), pre, -torch.inf).topk(3, sorted=False)
        known = pre.topk(4 * K, sorted=False)
        assert pre.computed is None
        with torch.no_grad():
            sae.encoder.weight.add_(1)
        with pytest.raises(RuntimeError, match=r"weight has been changed in place"):
            pre.sum()
        # As they were: nothing has to be computed for that.
        assert pre.topk(3).indices.equal(known.indices[:, :3])


@pytest.mark.parametrize("look", ["hook", "retain"])
def test_gradient_of_pre_activations_is_seen(look):
    def run():
        sae, seen = coder(), []
        pre = sae.encode(tokens()).pre_acts
        if look == "hook":
            pre.register_hook(seen.append)
        else:
            pre.retain_grad()
        torch.where(torch.arange(M) < 9, pre, -torch.inf).topk(3)[0].square().sum().backward()
        return seen if look == "hook" else pre.grad, gradients(sae)

    assert_alike(*reversed(with_and_without(run)))


@every_coder
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_modes(kind, mode):
    def run():
        with mode():
            out = coder(kind)(tokens(), dead_mask=torch.arange(M) < 9)
            return [t + 0 for t in (out.sae_out, out.fvu, out.auxk_loss, out.multi_topk_fvu)]

    assert_alike(*reversed(with_and_without(run)))


@every_coder
def test_autocast(kind):
    x = tokens(dtype=torch.float32)

    def run():
        sae = coder(kind, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            acts, indices, pre = sae.encode(x)
            out = sae(x, dead_mask=torch.arange(M) < 9)
            (out.fvu + out.auxk_loss).backward()
        return out, acts, pre + 0, indices, gradients(sae)

    (out, acts, pre, indices, grads), (out_, acts_, pre_, indices_, grads_) = with_and_without(run)
    assert acts_.dtype == acts.dtype == pre_.dtype == pre.dtype == torch.bfloat16
    assert_alike(pre_.detach(), pre.detach(), 0.02)
    same = (indices.sort(dim=1).values == indices_.sort(dim=1).values).all(dim=1)
    assert same.float().mean() > 0.7
    assert out_.sae_out.dtype == out.sae_out.dtype
    if kind != "skip" and kind != "multi_topk":
        assert_alike(out_.sae_out[same], out.sae_out[same], 0.05)
    for name, grad in grads.items():
        assert grads_[name].dtype == grad.dtype
        assert grads_[name].sub(grad).norm() < 0.3 * grad.norm()


def test_autocast_gradients_stay_in_the_weights_precision():
    x, grad = tokens(dtype=torch.float32), tokens(N, seed=7, dtype=torch.float32)[:, :K]

    def encode():
        sae = coder(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            return sae, *in_order(*sae.encode(x)[:2])

    (_, _, indices), (_, _, indices_) = with_and_without(encode)
    same = (indices == indices_).all(dim=1, keepdim=True)  # but for ties in bfloat16
    assert same.float().mean() > 0.7

    def run():
        sae, acts, _ = encode()
        (acts.float() * grad * same).sum().backward()
        return sae.encoder.weight.grad, sae.encoder.bias.grad

    assert_alike(*reversed(with_and_without(run)), SINGLE)


def test_copies_and_pickles():
    with adapter.apply(least_work=0, on_refuse="raise"):
        sae = coder()
        right = sae(tokens()).sae_out
        assert_alike(copy.deepcopy(sae)(tokens()).sae_out, right)
        assert_alike(pickle.loads(pickle.dumps(sae))(tokens()).sae_out, right)
        pre = sae.encode(tokens()).pre_acts.detach()
        assert_alike(copy.deepcopy(pre), pickle.loads(pickle.dumps(pre)))


def test_saved_and_loaded(tmp_path):
    sae = coder()
    with adapter.apply(least_work=0, on_refuse="raise"):
        sae(tokens()).fvu.backward()
        sae.save_to_disk(tmp_path)
        loaded = SparseCoder.load_from_disk(tmp_path)
        assert_alike(loaded(tokens()).sae_out, sae(tokens()).sae_out)


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_compiled_it_is_the_librarys_own():
    sae, x = coder(), tokens()
    right = sae(x).sae_out
    with adapter.apply(least_work=0, on_refuse="raise"):
        torch._dynamo.reset()
        before = sum(adapter.status().served.values())
        assert_alike(torch.compile(lambda x: sae.decode(*sae.encode(x)[:2]), backend="eager")(x), right)
        assert sum(adapter.status().served.values()) == before


# What is refused.


def encoder_of(k: int, activation: str = "topk", change: Callable = lambda x: x) -> Callable:
    return lambda x, W, b: encoding.fused_encoder(change(x), W, b, k, activation)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (encoder_of(25), "k > M / 4"),
        (encoder_of(0), "k < 1"),
        (encoder_of(K, change=lambda x: x.requires_grad_()[None]), "input is not (N, D)"),
        (encoder_of(5, "groupmax"), "groups of different sizes"),
        (encoder_of(K, "other"), "activation is unknown"),
        (encoder_of(K, change=Tensor.float), "dtypes differ"),
        (
            lambda x, W, b: decoding.decoder_impl(torch.zeros(N, 2).long(), x[:, :2].float(), W.mT),
            "dtypes differ",
        ),
        (
            lambda x, W, b: decoding.decoder_impl(torch.zeros(2).long(), x[0, :2], W.mT),
            "acts and indices are not (N, k)",
        ),
    ],
)
def test_refused(call, why):
    def outcome():
        try:
            return call(tokens(), tokens(M, seed=1), tokens(M, seed=2)[:, 0])
        except (RuntimeError, ValueError) as error:
            return str(error)

    right = outcome()
    with adapter.apply(least_work=0):
        assert_alike(outcome(), right)
    assert why in refusals()
    with adapter.apply(least_work=0, on_refuse="raise"):
        assert "served by the library's own code" in str(outcome())


def test_little_work_is_the_librarys_own():
    sae = coder()
    with adapter.apply():
        sae(tokens())
    assert "little work" in refusals()


def test_another_library_of_this_name(monkeypatch):
    def fused_encoder(input, weight, bias, k, activation, use_fp8=False):
        raise AssertionError

    other = types.ModuleType("sparsify.fused_encoder")
    other.fused_encoder = fused_encoder
    monkeypatch.setitem(sys.modules, "sparsify.fused_encoder", other)
    for force in (False, True):
        with pytest.raises(RuntimeError, match=r"must be eai-sparsify, got clt-training"):
            adapter.apply(force=force)
    with pytest.raises(RuntimeError, match="clt-training"):
        adapter.convert(coder())


# Applied and undone.


def test_undo_leaves_nothing():
    changed = changed_by("sparsify", adapter.apply)
    # Also what it imports by name.
    for name in ("fused_encoder.fused_encoder", "sparse_coder.fused_encoder"):
        assert f"sparsify.{name}" in changed
    for name in ("utils.decoder_impl", "sparse_coder.decoder_impl"):
        assert f"sparsify.{name}" in changed


@every_coder
def test_convert(kind):
    sae, other = coder(kind), coder(kind)
    right = sae(tokens()).sae_out
    adapter.LIBRARY.least_work = 0
    assert adapter.convert(sae) is sae
    before = sum(adapter.status().served.values())
    assert_alike(sae(tokens()).sae_out, right)
    assert sum(adapter.status().served.values()) > before
    before = sum(adapter.status().served.values())
    assert_alike(other(tokens()).sae_out, right)
    assert sum(adapter.status().served.values()) == before
