"""openai/sparse_autoencoder with our ops beneath it: codes, losses, gradients and training of dense maths.

It has no release: unreleased.py says what stands in for it, and how a checkout is tested instead.
"""

import copy
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton_interpreter
from alike import EXACT, SINGLE, assert_alike, changed_by, gradients, in_order
from torch import Tensor, nn
from unreleased import unreleased

from fastsparse import compat
from fastsparse.compat import sparse_autoencoder as adapter
from fastsparse.compat._library import digest_of

if importlib.util.find_spec("wandb") is None and "FASTSPARSE_CHECKOUTS" in os.environ:
    sys.modules["wandb"] = types.ModuleType("wandb")  # train imports it, to log
LIBRARY = unreleased("sparse_autoencoder", "sparse_autoencoder", ("kernels", "model", "train"))
applied, with_and_without = LIBRARY.applied, LIBRARY.with_and_without

N, D, M, K = 24, 16, 96, 4
PRODUCTS = (
    "triton_sparse_dense_matmul",
    "triton_sparse_transpose_dense_matmul",
    "triton_dense_dense_sparseout_matmul",
)
both_precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def unpatched(monkeypatch):
    monkeypatch.setattr(adapter.LIBRARY, "least_work", adapter.LIBRARY.least_work)
    with LIBRARY.imported():
        yield
        adapter.undo()


def tokens(*leading: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(leading or (N,)), D, generator=generator, dtype=torch.float64).to(dtype)


def code(seed: int = 0, k: int = K, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Indices and values, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    values, indices = torch.rand(N, M, generator=generator, dtype=torch.float64).topk(k)
    return indices, values.mul(2).sub(1).relu().to(dtype)


def filled(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Parameters of a seed, in the layout that they have."""
    module.to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(module.named_parameters()):
        scale = 0.1 if name.endswith("bias") else D**-0.5
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
        parameter.data.copy_(values)
    return module


def refusals() -> set[str]:
    return {why for _, why in adapter.status().refused}


# The products.


@pytest.mark.parametrize(
    ("values", "matrix"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("autocast", [False, True])
def test_products(values, matrix, autocast):
    indices, entries = code(dtype=values)
    rows, atoms = tokens(dtype=matrix), tokens(M, seed=1, dtype=matrix)

    def run(library):
        products = [getattr(library.kernels, name) for name in PRODUCTS]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = (
                products[0](indices, entries, atoms),
                products[1](indices, entries, rows, M),
                products[2](rows.to(values), atoms.T, indices),
            )
        assert all(product.dtype == values for product in found)
        return found

    within = {torch.float64: EXACT, torch.float32: SINGLE}.get(values, 0.01)
    without, ours = with_and_without(run)
    assert_alike(ours, without, within)


def test_products_keep_the_names_of_their_arguments():
    indices, entries = code()
    with applied(on_refuse="raise"):
        kernels = LIBRARY.tested.kernels
        kernels.triton_sparse_dense_matmul(
            sparse_indices=indices, sparse_values=entries, dense=tokens(M, seed=1)
        )
        kernels.triton_sparse_transpose_dense_matmul(
            sparse_indices=indices, sparse_values=entries, dense=tokens(), N=M, BLOCK_SIZE_AK=64
        )
        kernels.triton_dense_dense_sparseout_matmul(
            dense1=tokens(), dense2=tokens(M, seed=1).T, at_indices=indices
        )


@both_precisions
@pytest.mark.parametrize("place", ["kernels", "train"])
@pytest.mark.parametrize("contiguous", [False, True])
def test_decoder(dtype, place, contiguous):
    def run(library):
        indices, values = code(dtype=dtype)
        weight = tokens(M, seed=1, dtype=dtype).T
        leaves = values.clone(), (weight.contiguous() if contiguous else weight).detach().clone()
        values, weight = (leaf.requires_grad_() for leaf in leaves)
        decoder = getattr(library, place).TritonDecoderAutograd
        decoded = decoder.apply(indices, values, weight)
        decoded.pow(3).sum().backward()
        return decoded, values.grad, weight.grad

    without, ours = with_and_without(run)
    assert_alike(ours, without, EXACT if dtype == torch.float64 else SINGLE)
    assert all(adapter.status().served[f"sparse_autoencoder.kernels.{name}"] for name in PRODUCTS)


def test_decoder_has_second_derivatives():
    indices, values = code()
    values, weight = (values + 0.1).requires_grad_(), tokens(M, seed=1).T.detach().requires_grad_()
    with applied(on_refuse="raise"):
        decoder = LIBRARY.tested.kernels.TritonDecoderAutograd

        def decode(values, weight):
            return decoder.apply(indices[:3], values[:3], weight)

        assert torch.autograd.gradgradcheck(decode, (values, weight))


# Selection.


class OneRank:
    """A group of which there is nobody else."""

    def size(self) -> int:
        return 1

    def all_reduce(self, x, **_) -> None:
        pass

    def all_gather(self, parts, x, **_) -> None:
        for part in parts:
            part.copy_(x)


class TwoRanks(OneRank):
    def size(self) -> int:
        return 2


@pytest.mark.parametrize("comm", [None, OneRank()])
@pytest.mark.parametrize("capacity", [None, 1, 4])
def test_selection(comm, capacity):
    scores = tokens() @ tokens(M, seed=1).T

    def run(library):
        inds, vals = library.train.sharded_topk(scores, K, comm, capacity_factor=capacity)
        return in_order(vals, inds)

    assert_alike(*reversed(with_and_without(run)))


@pytest.mark.skipif(not LIBRARY.is_checkout, reason="what stands in for the library has no such bug")
def test_selection_on_one_device_stops_without_us():
    with pytest.raises(AttributeError, match="size"):
        LIBRARY.tested.train.sharded_topk(torch.randn(N, M), K, None, capacity_factor=4)


# The autoencoder that is trained.


def fast(
    library: SimpleNamespace, auxk: int | None = 6, dead: int = 20, comm=None, dtype=torch.float64
) -> nn.Module:
    """So many of its latents have been dead for long."""
    comms = library.train.ShardingComms(1, 1, 0, 0, None, comm, 0)
    ae = filled(library.train.FastAutoencoder(M, D, K, auxk, 5, comms), dtype)
    ae.stats_last_nonzero[:dead] = 100
    ae.latent_bias.data[:dead] -= 1.5  # so that they stay so
    return ae


def dense_code(inds: Tensor, vals: Tensor) -> Tensor:
    return vals.new_zeros(len(vals), M).scatter_add(1, inds, vals)


def loss_of(ae: nn.Module, x: Tensor, recons: Tensor, info: dict) -> Tensor:
    loss = (recons - x).square().mean()
    if info["auxk_inds"] is None:
        return loss
    aux = ae.decode_sparse(info["auxk_inds"], info["auxk_vals"])
    return loss + (aux - (x - recons.detach())).square().mean() / 3


@both_precisions
@pytest.mark.parametrize("comm", [None, OneRank()])
@pytest.mark.parametrize(("auxk", "dead"), [(None, 20), (6, 0), (6, 3), (6, 20), (6, M), (90, 80), (1, 1)])
def test_fast_autoencoder(dtype, comm, auxk, dead):
    def run(library):
        ae, x = fast(library, auxk, dead, comm, dtype), tokens(dtype=dtype)
        if auxk is not None and dead:
            ae.latent_bias.data[: dead // 2] += 1.5
        recons, info = ae(x)
        loss_of(ae, x, recons, info).backward()
        auxiliary = None
        if auxk is None:
            assert info == {"auxk_inds": None, "auxk_vals": None}
        else:
            assert info["auxk_inds"].shape == info["auxk_vals"].shape == (N, auxk)
            auxiliary = dense_code(**{name[5:]: part for name, part in info.items()})
        strides = ae.decoder.weight.grad.stride() == ae.decoder.weight.stride()
        return recons, auxiliary, gradients(ae), ae.stats_last_nonzero, strides

    without, ours = with_and_without(run)
    assert_alike(ours, without, EXACT if dtype == torch.float64 else SINGLE)
    assert adapter.status().served["sparse_autoencoder.train.FastAutoencoder.forward"]


def test_tokens_get_no_gradient():
    def run(library):
        ae, x = fast(library), tokens().requires_grad_()
        recons, info = ae(x)
        loss_of(ae, x.detach(), recons, info).backward()
        return x.grad, gradients(ae)

    without, ours = with_and_without(run)
    assert_alike(ours, without)
    assert ours[0] is None


@pytest.mark.parametrize("used", ["recons", "auxk_vals"])
def test_where_only_one_is_used(used):
    def run(library):
        ae = fast(library, auxk=6, dead=40)
        recons, info = ae(tokens())
        (recons if used == "recons" else info[used]).square().sum().backward()
        return gradients(ae)

    without, ours = with_and_without(run)
    assert_alike(ours, without)


def test_a_copy_asks_whom_the_library_asks():
    def run(library):
        ae = copy.deepcopy(fast(library, dead=20))
        ae.stats_last_nonzero.zero_()
        recons, info = ae(tokens())
        return recons, dense_code(info["auxk_inds"], info["auxk_vals"]), ae.stats_last_nonzero

    without, ours = with_and_without(run)
    assert_alike(ours, without)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes(mode):
    def run(library):
        ae = fast(library)
        with mode():
            recons, info = ae(tokens())
            return recons + 0, dense_code(info["auxk_inds"], info["auxk_vals"]), ae.stats_last_nonzero

    assert_alike(*reversed(with_and_without(run)))


def test_autocast():
    x = tokens(dtype=torch.float32)

    def run(library):
        ae = fast(library, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            recons, info = ae(x)
        loss_of(ae, x, recons, info).backward()
        return recons, info["auxk_vals"], gradients(ae)

    # By dense maths in single precision: autocast would round our stand-in's products, too.
    with torch.autocast("cpu", enabled=False):
        ae = fast(LIBRARY.dense, dtype=torch.float32)
        recons, info = ae(x)
        loss_of(ae, x, recons, info).backward()
    with applied(on_refuse="raise"):
        recons_, aux_, grads_ = run(LIBRARY.tested)
    assert aux_.dtype == torch.bfloat16
    assert recons_.dtype == torch.float32
    for name, grad in gradients(ae).items():
        assert grads_[name].dtype == grad.dtype
        assert grads_[name].sub(grad).norm() < 0.3 * grad.norm()
    assert recons_.sub(recons).norm() < 0.1 * recons.norm()


@both_precisions
@pytest.mark.parametrize("auxk", [None, 6])
def test_training(dtype, auxk):
    def run(library):
        ae = fast(library, auxk, dtype=dtype)
        optimizer = torch.optim.Adam(ae.parameters(), lr=1e-3)
        losses = []
        for step in range(20):
            x = tokens(seed=step, dtype=dtype)
            loss = loss_of(ae, x, *ae(x))
            optimizer.zero_grad()
            loss.backward()
            ae.decoder.weight.data /= ae.decoder.weight.data.norm(dim=0)
            optimizer.step()
            losses.append(loss.item())
        strides = {name: tensor.stride() for name, tensor in ae.state_dict().items()}
        return losses, dict(ae.state_dict()), strides

    without, ours = with_and_without(run)
    assert_alike(ours, without, 1e-7 if dtype == torch.float64 else 1e-3)
    assert len(set(without[0])) == 20


@pytest.mark.skipif(
    not LIBRARY.is_checkout or triton_interpreter.unavailable() is not None,
    reason="needs a checkout, and Triton's interpreter",
)
def test_the_librarys_own_kernels():
    def run():
        ae, x = fast(LIBRARY.tested, comm=OneRank(), dtype=torch.float32), tokens(dtype=torch.float32)
        recons, info = ae(x)
        loss_of(ae, x, recons, info).backward()
        auxiliary = dense_code(info["auxk_inds"], info["auxk_vals"])
        return recons, auxiliary, gradients(ae), ae.stats_last_nonzero

    with triton_interpreter.interpreting():
        own = run()
    with applied(on_refuse="raise"):
        assert_alike(run(), own, SINGLE)


# The published models.


OPTIONS = {
    "plain": {},
    "tied": {"tied": True},
    "normalize": {"normalize": True},
    "identity": {},
}
every_model = pytest.mark.parametrize("kind", OPTIONS)


def published(library: SimpleNamespace, kind: str = "plain", dtype=torch.float64, activation=None):
    if activation is None:
        activation = library.model.TopK(K, nn.Identity() if kind == "identity" else nn.ReLU())
    ae = library.model.Autoencoder(M, D, activation=activation, **OPTIONS[kind])
    return filled(ae, dtype)


@every_model
@both_precisions
def test_encode_and_decode(kind, dtype):
    def run(library):
        ae, x = published(library, kind, dtype), tokens(dtype=dtype).requires_grad_()
        latents, info = ae.encode(x)
        recons = ae.decode(latents, info)
        recons.pow(3).sum().backward()
        return latents, info, recons, x.grad, gradients(ae)

    without, ours = with_and_without(run)
    assert_alike(ours, without, EXACT if dtype == torch.float64 else SINGLE)
    for name in ("Autoencoder.encode_pre_act", "Autoencoder.decode", "TopK.forward"):
        assert adapter.status().served[f"sparse_autoencoder.model.{name}"]


@every_model
@pytest.mark.parametrize("read", [False, True])
def test_forward(kind, read):
    def run(library):
        ae, x = published(library, kind), tokens().requires_grad_()
        pre, latents, recons = ae(x)
        loss = recons.square().sum() + latents.abs().sum() / 5
        if read:
            loss = loss + pre.square().mean()
        loss.backward()
        return pre + 0, latents, recons, x.grad, gradients(ae), ae.stats_last_nonzero

    assert_alike(*reversed(with_and_without(run)))


def test_leading_dimensions():
    for leading in ((), (3,), (2, 3)):

        def run(library, leading=leading):
            ae, x = published(library), tokens(*leading) if leading else tokens(1)[0]
            latents, info = ae.encode(x)
            return latents, ae.decode(latents, info)

        assert_alike(*reversed(with_and_without(run)))


def test_pre_activations_are_not_made():
    ae = published(LIBRARY.tested)
    with applied(on_refuse="raise"):
        pre, _, _ = ae(tokens())
        assert pre.computed is None


def test_activations_that_are_changed_are_decoded_as_they_stand():
    def run(library):
        ae = published(library)
        latents, info = ae.encode(tokens())
        latents[:, 3] = 7
        return ae.decode(latents, info)

    assert_alike(*reversed(with_and_without(run, on_refuse="fallback")))
    assert "latents: changed in place" in refusals()


def test_a_topk_of_given_scores():
    def run(library):
        scores = (tokens() @ tokens(M, seed=1).T).requires_grad_()
        acts = library.model.TopK(K)(scores)
        acts.pow(3).sum().backward()
        return acts, scores.grad

    assert_alike(*reversed(with_and_without(run)))


# What is refused.


def outcome(call: Callable, *arguments):
    try:
        return call(*arguments)
    except Exception as error:
        return type(error)


def changed(name: str, value: object) -> Callable:
    """A call of the autoencoder that is trained, one of whose attributes is another."""

    def call(library):
        ae = fast(library, **({name: value} if name == "auxk" else {}))
        setattr(ae, name, value)
        return ae(tokens())[0]

    return call


def with_two_ranks(library):
    ae = fast(library, auxk=None)
    ae.comms.sh_comm = TwoRanks()
    return ae(tokens())[0]


def with_hooks(library):
    ae = published(library)
    ae.decoder.register_forward_hook(lambda *_: None)
    return ae.decode(*ae.encode(tokens()))


def with_decoder_bias(library):
    ae = published(library)
    ae.decoder = filled(nn.Linear(M, D))
    return ae.decode(*ae.encode(tokens()))


def without_info(library):
    ae = published(library, "normalize")
    return ae.decode(ae.encode(tokens())[0])


REFUSED = [
    (with_two_ranks, "latents on more than one rank"),
    (
        lambda lib: lib.train.sharded_topk(tokens(), 4, OneRank(), capacity_factor=0.5),
        "capacity_factor < 1",
    ),
    (changed("k", 25), "k > M / 4"),
    (changed("k", 0), "k or auxk is out of range"),
    (changed("auxk", M + 1), "k or auxk is out of range"),
    (changed("auxk_mask_fn", lambda x: x * 0), "an auxk_mask_fn of others"),
    (lambda lib: fast(lib, auxk=None)(tokens(2, 3))[0], "x is not (N, D)"),
    (lambda lib: fast(lib, dtype=torch.float32)(tokens())[0], "dtypes differ"),
    (
        lambda lib: lib.kernels.triton_sparse_dense_matmul(code()[0][0], code()[1][0], tokens(M)),
        "indices and values are not (N, k)",
    ),
    (
        lambda lib: lib.kernels.triton_sparse_dense_matmul(None, code()[1], tokens(M)),
        "a NoneType, no plain tensor",
    ),
    (lambda lib: published(lib, activation=nn.ReLU()).encode(tokens())[0], "an activation other than TopK"),
    (lambda lib: published(lib).encode_pre_act(tokens(), slice(0, 9)), "some latents"),
    (lambda lib: published(lib, activation=lib.model.TopK(25)).encode(tokens())[0], "k > M / 4"),
    (
        lambda lib: published(lib, activation=lib.model.TopK(K, nn.Softplus())).encode(tokens())[0],
        "a postact_fn other than ReLU and Identity",
    ),
    (lambda lib: published(lib, dtype=torch.float32).encode(tokens())[0], "dtypes differ"),
    (lambda lib: published(lib).decode(tokens() @ tokens(M).T), "latents: not made of a code"),
    (with_hooks, "hooks"),
    (with_decoder_bias, "a decoder of another class, or with a bias"),
    (without_info, "no info"),
]


@pytest.mark.parametrize(("call", "why"), REFUSED)
def test_refused(call, why):
    right = outcome(call, LIBRARY.dense)
    with applied():
        found = outcome(call, LIBRARY.tested)
    if not LIBRARY.is_checkout:  # whose own kernels need a GPU
        assert_alike(found, right)
    assert why in refusals()
    with applied(on_refuse="raise"), pytest.raises(RuntimeError, match="served by the library's own"):
        call(LIBRARY.tested)


def test_little_work_is_the_librarys_own_where_it_can_do_it():
    with applied(least_work=1 << 40):
        ae = published(LIBRARY.tested)
        ae.decode(*ae.encode(tokens()))
        before = adapter.status().served["sparse_autoencoder.train.FastAutoencoder.forward"]
        fast(LIBRARY.tested)(tokens())
        assert adapter.status().served["sparse_autoencoder.train.FastAutoencoder.forward"] == before + 1
    assert "little work" in refusals()


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_compiled_it_is_the_librarys_own():
    ae, x = published(LIBRARY.tested), tokens()
    right = ae.decode(*ae.encode(x))
    with applied(on_refuse="raise"):
        torch._dynamo.reset()
        before = sum(adapter.status().served.values())
        assert_alike(torch.compile(lambda x: ae.decode(*ae.encode(x)), backend="eager")(x), right)
        assert sum(adapter.status().served.values()) == before


# Applied and undone.


def test_undo_leaves_nothing():
    changed = changed_by("sparse_autoencoder", applied)
    for name in PRODUCTS:  # also where train has imported them
        assert {f"sparse_autoencoder.{place}.{name}" for place in ("kernels", "train")} <= changed
    assert "sparse_autoencoder.train.FastAutoencoder.forward" in changed


def test_what_isnt_the_commit_that_was_tested():
    LIBRARY.assert_told_by_its_functions()


def test_status_has_no_version():
    with applied():
        assert adapter.status().version is None
        assert str(adapter.status()).startswith("sparse_autoencoder (no release): applied")


def test_it_is_among_those_that_are_imported(monkeypatch):
    monkeypatch.setattr(compat, "LIBRARIES", ("sparse_autoencoder",))
    with compat.apply(least_work=0, force=True):
        assert adapter.status().applied
    assert not adapter.status().applied


def test_not_to_be_imported():
    for name in LIBRARY.tested.all:
        del sys.modules[name]
    sys.modules["sparse_autoencoder"] = None
    with pytest.raises(
        ModuleNotFoundError, match=r"a clone of https://github\.com/openai/sparse_autoencoder"
    ):
        adapter.apply(force=True)
    assert adapter.status().version is None


@pytest.mark.parametrize("missing", ["triton", "wandb"])
def test_without_packages_for_training_models_are_served(monkeypatch, missing):
    lacking = ("kernels", "train") if missing == "triton" else ("train",)

    def refuse(name, *rest):
        if name in {f"sparse_autoencoder.{module}" for module in lacking}:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return imported(name, *rest)

    imported = importlib.import_module
    monkeypatch.setattr("fastsparse.compat._library.importlib.import_module", refuse)
    with applied(on_refuse="raise"):
        kernel = vars(LIBRARY.tested.kernels)[PRODUCTS[0]]
        assert getattr(kernel, "_fastsparse", False) == (missing == "wandb")
        ae = published(LIBRARY.tested)
        ours = ae.decode(*ae.encode(tokens()))
    assert_alike(ours, ae.decode(*ae.encode(tokens())))


@pytest.mark.parametrize("make", [fast, published])
def test_convert(monkeypatch, make):
    def found(site):
        return replace(site, digest=digest_of(adapter.LIBRARY._current(site)))

    monkeypatch.setattr(adapter.LIBRARY, "sites", tuple(map(found, adapter.LIBRARY.sites)))
    adapter.LIBRARY.least_work = 0
    module, other = make(LIBRARY.tested), make(LIBRARY.tested)
    for each in (module, other):
        each.decode_sparse = lambda inds, vals: vals  # the products of a checkout aren't ours then
    assert adapter.convert(module) is module
    served = sum(adapter.status().served.values())
    if make is fast:
        module(tokens())
    else:
        assert_alike(module(tokens())[2], other(tokens())[2])
    count = sum(adapter.status().served.values())
    assert count > served
    outcome(other, tokens())
    assert sum(adapter.status().served.values()) == count
