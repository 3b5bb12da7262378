"""overcomplete with our ops under it: codes, reconstructions, gradients and training runs as without."""

import copy
import importlib.util
import pickle
import sys
from collections import defaultdict
from contextlib import nullcontext

import pytest
import torch
from alike import STEPS
from torch import Tensor, nn

import fastsparse.compat
from benchmarks.peers.overcomplete import stand_in_for_the_package
from fastsparse.codes import code_of
from fastsparse.compat import overcomplete

if importlib.util.find_spec("overcomplete") is None:
    pytest.skip("overcomplete is not installed: make peers-test", allow_module_level=True)
stand_in_for_the_package()

from overcomplete import metrics  # noqa: E402
from overcomplete.sae import (  # noqa: E402
    OMPSAE,
    QSAE,
    BatchTopKSAE,
    DictionaryLayer,
    JumpSAE,
    MpSAE,
    RATopKSAE,
    TopKSAE,
    losses,
    train,
)
from overcomplete.sae.modules import MLPEncoder  # noqa: E402
from overcomplete.sae.trackers import DeadCodeTracker  # noqa: E402

N, D, M = 24, 8, 64
TOPK, BATCH, PURSUIT = "TopKSAE.encode", "BatchTopKSAE.encode", "MpSAE.encode"
DECODE = "DictionaryLayer.forward"
SITES = {
    TOPK: "overcomplete.sae.topk_sae", BATCH: "overcomplete.sae.batchtopk_sae",
    PURSUIT: "overcomplete.sae.mp_sae", DECODE: "overcomplete.sae.dictionary",
    "RelaxedArchetypalDictionary.forward": "overcomplete.sae.archetypal_dictionary",
    "DeadCodeTracker.update": "overcomplete.sae.trackers", "l0_eps": "overcomplete.metrics",
}  # fmt: skip
ENCODERS = {
    "linear": lambda sae: sae,
    "tied": lambda sae: sae.tied(),
    "tied with a bias": lambda sae: sae.tied(bias=True),
    "untied": lambda sae: sae.untied(),
    "untied with a bias": lambda sae: sae.untied(bias=True, copy_from_dictionary=False),
}
KINDS = {
    "top-k": (TOPK, lambda **options: TopKSAE(D, M, top_k=5, **options)),
    "batch": (BATCH, lambda **options: BatchTopKSAE(D, M, top_k=5 * N, **options)),
    "pursuit": (PURSUIT, lambda **options: MpSAE(D, M, k=5, **options)),
    "archetypes": (TOPK, lambda: RATopKSAE(D, M, points=tokens(2 * M, D, seed=5), top_k=5)),
}
CRITERIA = {
    "mse": lambda x, x_hat, pre, z, dictionary: (x - x_hat).square().mean(),
    "l1": losses.mse_l1,
    "elastic": losses.mse_elastic,
    "auxiliary": losses.top_k_auxiliary_loss,
    "reanimation": lambda x, x_hat, *rest: (
        (x - x_hat).square().mean() + losses.reanimation_regularizer(x, x_hat, *rest)
    ),
}
every_kind = pytest.mark.parametrize("kind", ["top-k", "batch", "pursuit"])


@pytest.fixture(autouse=True)
def _as_it_was():
    """No test leaves the library patched, or counts for the next one."""
    yield
    overcomplete.undo()
    overcomplete.LIBRARY._served.clear()
    overcomplete.LIBRARY._refused.clear()


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(*(shape or (N, D)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype)


def seeded(kind: str, encoder: str = "linear", dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    torch.manual_seed(1)
    sae = ENCODERS[encoder](KINDS[kind][1](**options))
    if getattr(sae.encoder, "bias", None) is not None:
        nn.init.normal_(sae.encoder.bias, std=0.1)
    return sae.to(dtype)


def ours(patched: bool):
    return overcomplete.apply(least_work=0) if patched else nullcontext()


def served(name: str) -> int:
    return overcomplete.status().served[f"{SITES[name]}.{name}"]


def refused(name: str) -> dict[str, int]:
    label = f"{SITES[name]}.{name}"
    return {why: count for (site, why), count in overcomplete.status().refused.items() if site == label}


def assert_close(found: Tensor, right: Tensor) -> None:
    assert (found.shape, found.dtype, found.layout) == (right.shape, right.dtype, right.layout)
    assert found.stride() == right.stride() or found.numel() == 0
    bound = {torch.float64: 1e-12, torch.float32: 1e-5}.get(right.dtype, 2e-2)
    scale = right.detach().abs().max() if right.numel() else 1
    torch.testing.assert_close(found.detach(), right.detach(), rtol=0, atol=bound * float(scale) + 1e-30)


def step(sae: nn.Module, x: Tensor, criterion: str = "mse") -> dict[str, Tensor]:
    """All that a training step gives: outputs, loss, gradients, and what is kept for the next."""
    x = x.clone().requires_grad_()
    pre, z, x_hat = sae(x)
    loss = CRITERIA[criterion](x, x_hat, pre, z, sae.get_dictionary())
    loss.backward()
    found = {"z": z, "x_hat": x_hat, "loss": loss, "x": x.grad, "pre": pre.detach() + 0}
    found |= {name: parameter.grad for name, parameter in sae.named_parameters()}
    found |= {f"{name} itself": parameter.detach().clone() for name, parameter in sae.named_parameters()}
    if getattr(sae, "running_threshold", None) is not None:
        found["running threshold"] = sae.running_threshold
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_alike(make, x: Tensor, criterion: str = "mse", steps: int = 2) -> None:
    """Both ways of a module, from one seed, steps of it after one another."""
    runs = []
    for patched in (False, True):
        with ours(patched):
            sae = make()
            runs.append([step(sae, x + number, criterion) for number in range(steps)])
    for right, found in zip(*runs, strict=True):
        assert found.keys() == right.keys()
        for name in right:
            assert_close(found[name], right[name])


@pytest.mark.parametrize("kind", ["top-k", "batch"])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_step_is_the_same(kind, encoder, criterion, dtype):
    assert_alike(lambda: seeded(kind, encoder, dtype), tokens(dtype=dtype), criterion)
    assert served(KINDS[kind][0]) == 2
    assert served(DECODE) == 2


@pytest.mark.parametrize("criterion", ["mse", "l1", "elastic"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_of_matching_pursuit_is_the_same(criterion, dtype, scaled):
    options = {"dictionary_params": {"use_multiplier": scaled}}
    assert_alike(lambda: seeded("pursuit", dtype=dtype, **options), tokens(dtype=dtype), criterion)
    assert (served(PURSUIT), served(DECODE)) == (2, 2)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_step_over_archetypes_is_the_same(criterion):
    assert_alike(lambda: seeded("archetypes"), tokens(), criterion)
    assert served(TOPK) == served("RelaxedArchetypalDictionary.forward") == 2


@pytest.mark.parametrize(
    "normalization", ["l2", "max_l2", "l1", "max_l1", "identity", lambda w: w.clamp(-1, 1)]
)
def test_dictionaries_of_every_normalisation(normalization):
    options = {"dictionary_params": {"normalization": normalization, "use_multiplier": True}}
    for kind in ("top-k", "batch"):
        assert_alike(lambda kind=kind: seeded(kind, "tied", **options), tokens())
    assert served(DECODE) == 4


def trained(kind: str, *sides: bool) -> tuple[dict, dict]:
    """The logs and the state of 200 steps of its trainer, shared among sides: with our ops or without."""
    logs, state = defaultdict(list), None
    for patched in sides:
        sae = seeded(kind, dtype=torch.float64)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
        if state is not None:
            sae.load_state_dict(state["sae"])
            optimizer.load_state_dict(state["optimizer"])
        data = torch.utils.data.DataLoader(tokens(10 * N, D, seed=3, dtype=torch.float64), batch_size=N)
        epochs = STEPS // len(data) // len(sides)
        with ours(patched):
            told = train.train_sae(sae, data, losses.mse_l1, optimizer, nb_epochs=epochs, monitoring=2)
        for name, values in told.items():
            logs[name] += values
        state = {"sae": sae.state_dict(), "optimizer": optimizer.state_dict()}
    return logs, state["sae"]


@every_kind
@pytest.mark.parametrize("sides", [(True,), (True, False), (False, True)], ids=["ours", "from", "to"])
def test_training_by_its_trainer_is_the_same(kind, sides):
    right, right_state = trained(kind, False)
    found, state = trained(kind, *sides)
    steps = STEPS // len(sides)
    assert served(KINDS[kind][0]) == served(DECODE) == served("DeadCodeTracker.update") == steps
    assert found.keys() == right.keys()
    for name in right.keys() - {"time_epoch"}:
        assert found[name] == pytest.approx(right[name], rel=1e-7, abs=1e-9), name
    assert list(state) == list(right_state)
    for name, tensor in right_state.items():
        assert (state[name].shape, state[name].stride()) == (tensor.shape, tensor.stride())
        torch.testing.assert_close(state[name], tensor, rtol=1e-7, atol=1e-9)


def test_leading_dimensions():
    right = seeded("top-k", "untied with a bias")(tokens(2, 3, D))
    with ours(True):
        found = seeded("top-k", "untied with a bias")(tokens(2, 3, D))
    for one, other in zip(found, right, strict=True):
        assert_close(one + 0, other)
    assert served(TOPK) == served(DECODE) == 1


@every_kind
def test_inputs_that_it_refuses_meet_its_own_errors(kind):
    for x in (tokens(2, 3, D), tokens(N, D + 1), tokens(N, D, dtype=torch.float64)):
        errors = []
        for patched in (False, True):
            with ours(patched), pytest.raises((AssertionError, RuntimeError, IndexError)) as caught:
                seeded(kind)(x)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]
    assert not served(KINDS[kind][0])


# BatchTopK.


def test_all_that_come_to_the_threshold_are_kept():
    """One token over and over: where it ends the selection, all of its copies count."""
    x = tokens(1, D).expand(N, D).contiguous()
    for top_k in (1, N // 2, 3 * N, 3 * N + 1):
        sae = [BatchTopKSAE(D, M, top_k=top_k).double() for _ in range(2)]
        sae[1].load_state_dict(sae[0].state_dict())
        _, right = sae[0].encode(x.double())
        with ours(True):
            _, found = sae[1].encode(x.double())
        assert_close(found, right)
        assert_close(sae[1].running_threshold, sae[0].running_threshold)
        assert (found > 0).sum() % N == 0  # whole tokens
    assert served(BATCH) == 4


def test_fewer_positive_ones_than_it_wants():
    """Its threshold is 0, and all that is positive is kept."""

    def make():
        sae = seeded("batch", "untied with a bias", torch.float64)
        nn.init.constant_(sae.encoder.bias, -3.0)
        return sae

    assert_alike(make, tokens(dtype=torch.float64), steps=3)
    assert served(BATCH) == 3


def test_a_running_threshold_in_evaluation():
    outcomes = []
    for patched in (False, True):
        with ours(patched):
            sae = seeded("batch", dtype=torch.float64)
            for number in range(3):
                sae(tokens(seed=number, dtype=torch.float64))
            outcomes.append([sae.running_threshold, *sae.eval()(tokens(7, D, seed=9, dtype=torch.float64))])
    for found, right in zip(outcomes[1], outcomes[0], strict=True):
        assert_close(found + 0, right)
    assert served(BATCH) == served(DECODE) == 4


def test_what_equals_the_running_threshold_is_kept():
    sae = seeded("batch", "untied").train()
    sae.encoder.weight.data = torch.cat([torch.eye(D)] * (M // D))
    sae.eval()
    sae.running_threshold = torch.tensor(0.5)
    x = torch.zeros(N, D)
    x[0, 3], x[1, 3], x[2, 3] = 0.5, 0.49999997, 0.50000006
    with ours(True):
        _, z = sae.encode(x)
    assert served(BATCH) == 1
    assert z.sum(dim=1)[:4].tolist() == [0.5 * M // D, 0.0, pytest.approx(0.5 * M // D), 0.0]


@pytest.mark.parametrize(
    ("threshold", "why"),
    [
        (torch.tensor(0.0), "a running threshold that is not above 0"),
        (torch.tensor(torch.nan), "a running threshold that is not above 0"),
        (torch.tensor(1e-6), "k > M / 4"),
        (0.5, "no running threshold"),
    ],
    ids=str,
)
def test_thresholds_that_are_the_librarys_own_business(threshold, why):
    sae = seeded("batch").eval()
    sae.running_threshold = threshold
    right = sae(tokens())
    with ours(True):
        found = sae(tokens())
    for one, other in zip(found, right, strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    assert refused(BATCH) == {why: 1}


def test_no_running_threshold_yet():
    with ours(True), pytest.raises(AssertionError, match="not initialized"):
        seeded("batch").eval().encode(tokens())
    assert refused(BATCH) == {"no running threshold": 1}


def test_nan_surfaces():
    x = tokens()
    x[3, 2] = torch.nan
    for kind in ("top-k", "batch", "pursuit"):
        with ours(True):
            _, z, x_hat = seeded(kind)(x)
        assert z[3].isnan().any(), kind
        assert x_hat[3].isnan().all(), kind


# Matching pursuit.


def test_negative_coefficients_and_zero_tokens():
    """Atoms of a half-space: what is left soon has no positive score, and the library goes on."""

    def make():
        sae = seeded("pursuit", dtype=torch.float64)
        sae.dictionary._weights.data = sae.dictionary._weights.abs()
        return sae

    x = tokens(dtype=torch.float64)
    x[3:6] = 0
    assert_alike(make, x)
    assert served(PURSUIT) == 2
    assert make()(x)[1].min() < 0
    with ours(True):
        sae = seeded("pursuit")
        x = tokens()
        x[3:6] = 0
        assert code_of(sae.encode(x)[1]) is not None  # that a token is 0 needs nothing of the kind


def test_atoms_that_are_chosen_again():
    x, make = tokens(N, 2), lambda: MpSAE(2, 40, k=9)
    torch.manual_seed(3)
    right = make()
    found = copy.deepcopy(right)
    _, right_z = right.encode(x)
    with ours(True):
        _, z = found.encode(x)
        assert code_of(z).indices.sort(dim=1).values.diff(dim=1).eq(0).any()
        assert_close(z, right_z)
        assert_close(found.decode(z), right.decode(right_z))
        assert torch.equal(metrics.l0_eps(z, 0), (z.abs() >= 1e-6).float().mean(0))
    assert refused("l0_eps") == {"latents that occur more than once in a row": 1}


def test_pursuit_in_evaluation():
    right = seeded("pursuit").eval()(tokens())
    with ours(True):
        found = seeded("pursuit").eval()(tokens())
    for one, other in zip(found, right, strict=True):
        assert_close(one, other)
    assert served(PURSUIT) == 1


def scaled_dictionary(sae):
    sae.dictionary.multiplier.fill_(0.1)


def of_small_atoms(sae):
    sae.dictionary._weights.data[4] *= 1e-6


def of_another_norm(sae):
    sae.dictionary.normalization = DictionaryLayer.NORMALIZATIONS["l1"]


def fused_of_another_norm(sae):
    scaled_dictionary(sae)
    sae.eval()


def dropping(sae):
    sae.dropout = 0.5


def to_many(sae):
    sae.k = M // 4 + 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (scaled_dictionary, "atoms of another norm than 1"),
        (of_small_atoms, "atoms of another norm than 1"),
        (of_another_norm, "atoms of another norm than 1"),
        (fused_of_another_norm, "atoms of another norm than 1"),
        (dropping, "dropout"),
        (to_many, "k > M / 4"),
    ],
)
def test_pursuits_that_are_refused(change, why):
    outcomes = []
    for patched in (False, True):
        with ours(patched):
            sae = seeded("pursuit")
            change(sae)
            torch.manual_seed(8)
            outcomes.append([*sae(tokens()), sae.dictionary._weights.detach().clone()])
    assert refused(PURSUIT) == {why: 1}
    for found, right in zip(outcomes[1], outcomes[0], strict=True):
        assert torch.equal(found, right)  # it is the library's own code, and nothing happened before


# Refusals of encoders.


def hooked(sae):
    sae.encoder.final_block.register_forward_hook(lambda module, inputs, output: output + 1)


def hooked_backward(sae):
    sae.encoder.final_block[0].register_full_backward_hook(lambda module, grad, _: None)


def with_a_norm(sae):
    sae.encoder = MLPEncoder(D, M, nb_blocks=0)


def with_blocks(sae):
    sae.encoder = MLPEncoder(D, M, nb_blocks=2, norm_layer=nn.Identity)


def with_softplus(sae):
    sae.encoder.final_activation = nn.Softplus()


def in_place(sae):
    sae.encoder.final_activation = nn.ReLU(inplace=True)


def parametrized(sae):
    nn.utils.parametrizations.weight_norm(sae.encoder.final_block[0])


def of_its_own(sae):
    linear = sae.encoder.final_block[0]
    linear.forward = lambda x: nn.Linear.forward(linear, x) * 2


class Doubled(MLPEncoder):
    def forward(self, x):
        pre, z = super().forward(x)
        return 2 * pre, 2 * z


def of_a_subclass(sae):
    sae.encoder = Doubled(D, M, nb_blocks=0, norm_layer=nn.Identity)


def of_most(sae):
    sae.top_k *= 4


@pytest.mark.parametrize("kind", ["top-k", "batch"])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (hooked, "hooks"),
        (hooked_backward, "hooks"),
        (with_a_norm, "an encoder of blocks or with a norm"),
        (with_blocks, "an encoder of blocks or with a norm"),
        (with_softplus, "an activation other than ReLU"),
        (in_place, "an activation other than ReLU"),
        (parametrized, "an encoder of blocks or with a norm"),
        (of_its_own, "a module with a forward of its own"),
        (of_a_subclass, "an encoder of another class"),
        (of_most, "k > M / 4"),
    ],
)
def test_encoders_that_are_refused(kind, change, why):
    outcomes = []
    for patched in (False, True):
        with ours(patched):
            sae = seeded(kind)
            torch.manual_seed(4)
            change(sae)
            outcomes.append(sae(tokens()))
    assert refused(KINDS[kind][0]) == {why: 1}
    assert refused(DECODE) == {"not made of a code": 1}
    for found, right in zip(outcomes[1], outcomes[0], strict=True):
        assert torch.equal(found, right)


def test_little_work_is_left_to_the_library():
    with overcomplete.apply():
        seeded("top-k")(tokens())
    assert refused(TOPK) == {"little work": 1}


def test_a_refusal_may_raise_or_warn():
    with (
        overcomplete.apply(on_refuse="raise"),
        pytest.raises(RuntimeError, match=r"TopKSAE.encode is served by the library's own code: little work"),
    ):
        seeded("top-k")(tokens())
    with overcomplete.apply(on_refuse="warn"), pytest.warns(UserWarning, match="not made of a code"):
        seeded("top-k").decode(tokens(N, M))


# What becomes of the codes.


@every_kind
def test_codes_that_were_changed_are_decoded_as_they_are(kind):
    for change in (lambda z: z.mul_(2), lambda z: z[:, 3].fill_(0), lambda z: z.detach().add_(1)):
        found = []
        for patched in (False, True):
            with ours(patched), torch.no_grad():
                sae = seeded(kind)
                _, z = sae.encode(tokens())
                change(z)
                found.append(sae.decode(z))
        assert_close(found[1], found[0])
    assert refused(DECODE) == {"changed in place": 3}


@every_kind
@pytest.mark.parametrize("how", ["retain_grad", "hook"])
def test_gradients_of_codes_are_whole(kind, how):
    found = []
    for patched in (False, True):
        with ours(patched):
            sae, seen = seeded(kind), []
            _, z = sae.encode(tokens())
            z.retain_grad() if how == "retain_grad" else z.register_hook(seen.append)
            sae.decode(z).square().sum().backward()
            found.append(z.grad if how == "retain_grad" else seen[0])
    assert_close(found[1], found[0])
    assert not served(DECODE)


@every_kind
def test_codes_that_become_parameters_get_their_gradient(kind):
    found = []
    for patched in (False, True):
        with ours(patched):
            sae = seeded(kind)
            with torch.no_grad():
                _, z = sae.encode(tokens())
            sae.decode(z.requires_grad_()).square().sum().backward()
            found.append(z.grad)
    assert_close(found[1], found[0])
    assert refused(DECODE) == {"it retains its gradient": 1}


@every_kind
def test_hooks_on_the_autoencoder_and_its_dictionary_see_what_they_would(kind):
    found = []
    for patched in (False, True):
        with ours(patched):
            sae, seen = seeded(kind), []
            sae.dictionary.register_forward_hook(
                lambda module, inputs, output, seen=seen: seen.append(inputs[0] + output.sum())
            )
            sae.register_forward_hook(
                lambda module, inputs, output, seen=seen: seen.extend(part + 0 for part in output)
            )
            sae.dictionary.register_full_backward_hook(lambda module, grads, _, seen=seen: seen.extend(grads))
            sae.register_full_backward_hook(
                lambda module, _, grads, seen=seen: seen.extend(g for g in grads if g is not None)
            )
            sae(tokens().requires_grad_())[2].square().sum().backward()
            found.append(seen)
    assert len(found[0]) == len(found[1])
    for one, other in zip(found[1], found[0], strict=True):
        assert_close(one, other)


@every_kind
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(kind, mode):
    found = []
    for patched in (False, True):
        with ours(patched), mode():
            found.append([part + 0 for part in seeded(kind)(tokens())])
    for one, other in zip(found[1], found[0], strict=True):
        assert_close(one, other)
        assert not one.requires_grad
    assert served(KINDS[kind][0]) == 1
    assert served(DECODE) == (mode is torch.no_grad)


@every_kind
def test_dictionaries_of_another_size_and_dtype(kind):
    for other in (DictionaryLayer(D, 2 * M), DictionaryLayer(D, M - 1), DictionaryLayer(D, M).double()):
        errors = []
        for patched in (False, True):
            with ours(patched), pytest.raises(RuntimeError) as caught:
                other(seeded(kind).encode(tokens())[1])
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


def test_what_is_not_patched():
    """Codes that are refitted by projected gradients, and thresholds that are learned."""
    for make in (lambda: OMPSAE(D, M, k=3), lambda: JumpSAE(D, M), lambda: QSAE(D, M)):
        found = []
        for patched in (False, True):
            with ours(patched):
                torch.manual_seed(1)
                found.append(make()(tokens()))
        for one, other in zip(found[1], found[0], strict=True):
            assert torch.equal(one, other)
    assert overcomplete.status().served == {}


@every_kind
def test_copies_and_pickles(kind):
    with ours(True):
        sae = seeded(kind)
        right = sae(tokens())
        for other in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
            for one, another in zip(other(tokens()), right, strict=True):
                assert_close(one + 0, another + 0)
        pre, z, _ = right
        for part in (pre.detach(), z.detach()):
            for other in (copy.deepcopy(part), pickle.loads(pickle.dumps(part)), part.clone()):
                assert type(other) is Tensor
                assert torch.equal(other, part + 0)
    assert served(KINDS[kind][0]) == 3


def test_pre_codes_of_weights_that_are_gone():
    with ours(True):
        sae = seeded("top-k")
        pre, _ = sae.encode(tokens())
        with torch.no_grad():
            sae.encoder.final_block[0].weight.add_(1)
        with pytest.raises(RuntimeError, match="weight has been changed in place"):
            pre.sum()


@pytest.mark.parametrize("kind", ["top-k", "batch"])
@pytest.mark.parametrize("encoder", ["linear", "tied", "untied"])
def test_autocast(kind, encoder):
    """In bfloat16 many numbers tie, and sums are rounded elsewhere: nearly all picks are the same."""
    found = []
    for patched in (False, True):
        with ours(patched), torch.autocast("cpu", torch.bfloat16):
            sae = seeded(kind, encoder)
            pre, z, x_hat = sae(tokens(4 * N, D))
            (x_hat.float() - tokens(4 * N, D)).square().mean().backward()
            found.append((pre + 0, z, x_hat, sae.dictionary._weights.grad))
    right, mine = found
    for one, other in zip(mine, right, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    same = ((mine[1] > 0) == (right[1] > 0)).sum(dim=1) == M
    assert same.float().mean() > 0.9
    torch.testing.assert_close(mine[1][same].float(), right[1][same].float(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(mine[2][same].float(), right[2][same].float(), rtol=5e-2, atol=5e-2)
    assert served(KINDS[kind][0]) == served(DECODE) == 1


def test_ties_of_bfloat16_are_kept_as_in_the_library():
    """Integers, which no sum rounds: hundreds of entries equal the threshold."""
    x, weight = (
        torch.randint(-2, 3, (rows, D), generator=torch.Generator().manual_seed(rows)).float()
        for rows in (99, M)
    )
    found = []
    for patched in (False, True):
        with ours(patched), torch.autocast("cpu", torch.bfloat16):
            sae = seeded("batch", "untied")
            sae.encoder.weight.data = weight
            sae.top_k = 400
            found.append([*sae.encode(x), sae.running_threshold])
            sae.eval()
            found[-1] += sae.encode(x)
    for one, other in zip(found[1], found[0], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one + 0, other)
    assert (found[0][1] > 0).sum() > 400 + overcomplete.TIES
    assert served(BATCH) == 2


def test_what_autocast_would_change_is_refused():
    with ours(True), torch.autocast("cpu", torch.bfloat16):
        seeded("pursuit").encode(tokens())
        seeded("top-k", "tied with a bias").encode(tokens())
    assert refused(PURSUIT) == {"autocast": 1}
    assert refused(TOPK) == {"autocast, and a bias that it leaves out": 1}


@every_kind
def test_compiled_it_is_the_librarys_own_code(kind):
    torch.compiler.reset()
    right = seeded(kind)(tokens())
    with ours(True):
        found = torch.compile(seeded(kind), backend="eager")(tokens())
    for one, other in zip(found, right, strict=True):
        assert_close(one, other)
    assert not overcomplete.status().served


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # PyTorch's own
def test_transforms_of_functions_are_left_to_the_library():
    sae = seeded("top-k").eval()
    right = torch.func.vjp(lambda x: sae(x)[2], tokens())[1](tokens(seed=2))
    with ours(True):
        found = torch.func.vjp(lambda x: sae(x)[2], tokens())[1](tokens(seed=2))
        torch.func.jvp(lambda x: sae(x)[2], (tokens(),), (tokens(),))
    assert_close(found[0], right[0])
    assert not served(TOPK)


# Monitoring.


@every_kind
def test_monitoring_looks_at_the_codes(kind):
    with ours(True):
        _, z = seeded(kind).encode(tokens())
        tracker = DeadCodeTracker(M, "cpu")
        tracker.update(z)
        assert torch.equal(tracker.alive_features, (z > 0).any(dim=0))
        share = metrics.l0_eps(z, 0)
        assert_close(share, (z.abs() >= 1e-6).float().mean(0))
        assert_close(metrics.l0_eps(z), (z.abs() >= 1e-6).float().mean())
        assert metrics.l0_eps(z, 0, threshold=0.0).tolist() == [1.0] * M
        z.zero_()
        assert metrics.l0_eps(z, 0).sum() == 0
    assert served("DeadCodeTracker.update") == 1


# Applying and undoing.


def everything() -> dict[tuple[str, str], object]:
    """All attributes of all of the library's modules, and of the classes in them."""
    found = {}
    for name, module in sys.modules.items():
        if name.split(".")[0] == "overcomplete":
            for attribute, value in vars(module).items():
                found[name, attribute] = value
                if isinstance(value, type) and value.__module__.startswith("overcomplete"):
                    found |= {(f"{name}.{attribute}", part): its for part, its in vars(value).items()}
    return found


def test_undo_leaves_everything_as_it_was():
    before = everything()
    with ours(True):
        changed = {key for key, value in everything().items() if value is not before.get(key)}
        assert {attribute for _, attribute in changed} == {"encode", "forward", "update", "l0_eps"}
        assert ("overcomplete.sae.train", "l0_eps") in changed
        with pytest.raises(RuntimeError, match="our ops are under it already"):
            overcomplete.apply()
    after = everything()
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)


def test_it_is_among_all_libraries():
    with fastsparse.compat.apply(least_work=0):
        seeded("top-k")(tokens())
    found = {status.library: status for status in fastsparse.compat.status()}["overcomplete"]
    assert found.served["overcomplete.sae.topk_sae.TopKSAE.encode"] == 1
    assert not found.applied


@every_kind
def test_one_autoencoder_alone(kind, monkeypatch):
    monkeypatch.setattr(overcomplete.LIBRARY, "least_work", 0)
    sae, other = seeded(kind), seeded(kind)
    assert overcomplete.convert(sae) is sae
    right = other(tokens())
    for one, another in zip(sae(tokens()), right, strict=True):
        assert_close(one + 0, another)
    assert served(KINDS[kind][0]) == served(DECODE) == 1
    copied = copy.deepcopy(sae)
    for one, another in zip(copied(tokens()), right, strict=True):
        assert_close(one + 0, another)
    assert copied.encode.__self__ is copied
    assert served(KINDS[kind][0]) == 2
    assert sae.state_dict().keys() == other.state_dict().keys()


def test_only_its_own_modules_are_converted():
    with pytest.raises(TypeError, match="module must be of a class that is served, got Linear"):
        overcomplete.convert(nn.Linear(2, 2))
