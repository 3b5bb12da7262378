"""dictionary_learning with our ops beneath it and without: the same activations, losses, training."""

import copy
import importlib.util
import io
import pickle
import sys
import types
from contextlib import nullcontext
from functools import partial

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

if importlib.util.find_spec("dictionary_learning") is None:
    pytest.skip("dictionary_learning is not installed", allow_module_level=True)
if importlib.util.find_spec("nnsight") is None:  # it reads models' activations: nothing that is tested here
    sys.modules.setdefault("nnsight", types.ModuleType("nnsight")).LanguageModel = object

from dictionary_learning.dictionary import JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import (
    MatryoshkaBatchTopKSAE,
    MatryoshkaBatchTopKTrainer,
)
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

from fastsparse.codes import code_of
from fastsparse.compat import dictionary_learning as adapter

unpatched = alike.unpatched(adapter)
with_and_without, refusals = partial(alike.with_and_without, adapter), partial(alike.refusals, adapter)

SINGLE_L0 = 1e-6  # JumpReluTrainer counts in single precision
GROUPS = [16, 32, 48]
FRACTIONS = [16 / 96, 32 / 96, 48 / 96]
TRAINERS = ("topk", "batch", "matryoshka", "jump")
every_trainer = pytest.mark.parametrize("kind", TRAINERS)
every_dictionary = every_trainer


def raw_dictionary(kind: str) -> torch.nn.Module:
    made = {
        "topk": lambda: AutoEncoderTopK(D, M, K),
        "batch": lambda: BatchTopKSAE(D, M, K),
        "matryoshka": lambda: MatryoshkaBatchTopKSAE(D, M, K, GROUPS),
        "jump": lambda: JumpReluAutoEncoder(D, M),
    }[kind]
    return made()


def dictionary(kind: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    made = raw_dictionary(kind)
    return prepared(made, kind, dtype)


def prepared(made: torch.nn.Module, kind: str, dtype: torch.dtype) -> torch.nn.Module:
    """No parameter is 0, atoms are exact, and thresholds leave few activations."""
    made.to(dtype)
    atoms = tokens(M, seed=4)
    atoms /= atoms.norm(dim=1, keepdim=True)
    linear = kind in ("topk", "batch")
    for weight in (
        made.encoder.weight if linear else made.W_enc.T, made.decoder.weight.T if linear else made.W_dec
    ):  # fmt: skip
        weight.data.copy_(atoms)
    torch.manual_seed(2)
    for name, parameter in made.named_parameters():
        if name.startswith("b_") or name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    if kind == "jump":
        made.threshold.data.uniform_(1.6, 2.0)
    else:
        made.threshold.fill_(1.7)
    return made


def trainer(kind: str, dtype: torch.dtype = torch.float64, steps: int = 20, **options):
    options = {"warmup_steps": 1, "layer": 0, "lm_name": "none", "device": "cpu", "lr": 1e-3} | options
    sizes = {"steps": steps, "activation_dim": D, "dict_size": M}
    torch.manual_seed(1)
    if kind == "jump":
        options = {"bandwidth": 0.2, "target_l0": 4.0, "sparsity_warmup_steps": 0} | options
        made = JumpReluTrainer(**sizes, **options)
    else:
        options = {"k": K, "threshold_start_step": 2, "seed": 3} | options
        if kind == "matryoshka":
            made = MatryoshkaBatchTopKTrainer(**sizes, group_fractions=FRACTIONS, **options)
        else:
            made = {"topk": TopKTrainer, "batch": BatchTopKTrainer}[kind](**sizes, **options)
        made.dead_feature_threshold = 3 * N  # so that some are dead
    prepared(made.ae, kind, dtype)
    return made


def served() -> int:
    return sum(adapter.status().served.values())


# Dictionaries.


@pytest.mark.parametrize("return_topk", [False, True])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
def test_topk(return_topk, leading):
    x = tokens(*leading)[0] if leading == () else tokens(*leading)

    def run():
        sae, source = dictionary("topk"), x.clone().requires_grad_()
        found = sae.encode(source, return_topk=return_topk)
        acts, *rest = found if return_topk else (found,)
        decoded = sae.decode(acts)
        loss = decoded.square().sum()
        if return_topk:
            values, indices, post = rest
            loss = loss + values.sum() + post.pow(3).sum()
            rest = [*in_order(values, indices), post]
        loss.backward()
        return acts, decoded, *rest, source.grad, gradients(sae)

    assert_alike(*reversed(with_and_without(run)))


@pytest.mark.parametrize("kind", ["topk", "batch", "matryoshka"])
@pytest.mark.parametrize("threshold", [1.7, 2.5, 100.0])
def test_by_threshold(kind, threshold):
    def run():
        sae, source = dictionary(kind), tokens().requires_grad_()
        sae.threshold.fill_(threshold)
        acts = sae.encode(source, use_threshold=True)
        decoded = sae.decode(acts)
        decoded.square().sum().backward()
        return acts, decoded, source.grad, gradients(sae)

    assert_alike(*reversed(with_and_without(run)))


@pytest.mark.parametrize("kind", ["batch", "matryoshka"])
@pytest.mark.parametrize("use_threshold", [False, True])
@pytest.mark.parametrize("groups", [3, 2])
def test_batch(kind, use_threshold, groups):
    def run():
        sae, source = dictionary(kind), tokens().requires_grad_()
        sae.active_groups = groups
        acts, active, post = sae.encode(source, return_active=True, use_threshold=use_threshold)
        decoded = sae.decode(acts)
        (decoded.square().sum() + post.pow(3).sum()).backward()
        return acts, active, post, decoded, source.grad, gradients(sae)

    without, ours = with_and_without(run)
    assert_alike(ours, without)
    assert without[1].any()


@pytest.mark.parametrize("output_pre_jump", [False, True])
@pytest.mark.parametrize("apply_b_dec_to_input", [False, True])
@pytest.mark.parametrize("threshold", [(1.6, 2.0), (-0.5, 0.5)])
def test_jump(output_pre_jump, apply_b_dec_to_input, threshold):
    def run():
        sae, source = dictionary("jump"), tokens().requires_grad_()
        sae.apply_b_dec_to_input = apply_b_dec_to_input
        sae.threshold.data.uniform_(*threshold)
        sae.b_enc.data -= 2.0 if threshold[0] < 0 else 0.0
        found = sae.encode(source, output_pre_jump=output_pre_jump)
        acts, *pre = found if output_pre_jump else (found,)
        decoded = sae.decode(acts)
        (decoded.square().sum() + sum(p.pow(3).sum() for p in pre)).backward()
        return acts, *pre, decoded, source.grad, gradients(sae)

    assert_alike(*reversed(with_and_without(run)))


@every_dictionary
@pytest.mark.parametrize("output_features", [False, True])
def test_forward_in_single_precision(kind, output_features):
    x = tokens(dtype=torch.float32)

    def run():
        sae = dictionary(kind, torch.float32)
        found = sae(x, output_features=output_features)
        (found[0] if output_features else found).square().sum().backward()
        return found, gradients(sae)

    assert_alike(*reversed(with_and_without(run)), SINGLE)


def test_k_is_a_buffer_that_may_be_annealed():
    sae, x = dictionary("topk"), tokens()
    with adapter.apply(least_work=0, on_refuse="raise"):
        for k in (1, 7):
            sae.k.fill_(k)
            assert (sae.encode(x) != 0).sum(dim=-1).tolist() == [k] * N
            sae.k = torch.tensor(k)
            assert sae.encode(x, return_topk=True)[1].shape == (N, k)


@pytest.mark.parametrize("kind", ["topk", "batch"])
def test_picks_of_value_zero(kind):
    def run():
        sae, source = dictionary(kind), tokens().requires_grad_()
        sae.encoder.bias.data -= 2.2  # fewer are positive than k
        acts = sae.encode(source, use_threshold=False)
        decoded = sae.decode(acts)
        decoded.square().sum().backward()
        return acts, decoded, source.grad, gradients(sae)

    without, ours = with_and_without(run)
    assert_alike(ours, without)
    assert ((without[0] > 0).sum(dim=1) < K).any()


@every_dictionary
@pytest.mark.parametrize("leading", [(3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("use_threshold", [False, True])
def test_leading_dimensions(kind, leading, use_threshold):
    def run():
        sae, source = dictionary(kind), tokens(*leading).requires_grad_()
        acts = sae.encode(source, **({} if kind == "jump" else {"use_threshold": use_threshold}))
        decoded = sae.decode(acts)
        decoded.square().sum().backward()
        return acts, decoded, source.grad, gradients(sae)

    assert_alike(*reversed(with_and_without(run)))


def test_what_counts_rows_in_a_batch_of_sequences_is_the_librarys_own():
    def run():
        sae = dictionary("matryoshka")
        few = sae.encode(tokens(2, 30), return_active=True), sae.encode(tokens(2, M + 1))
        sae.active_groups = 1
        return few, sae.encode(tokens(2, 30)), sae.encode(tokens(2, 10))

    assert_alike(*reversed(with_and_without(run, "fallback")))
    assert "x is not (N, D)" in refusals()


# Activations in other hands.


@every_dictionary
def test_changed_activations(kind):
    def run():
        sae = dictionary(kind)
        acts = sae.encode(tokens())
        acts[:, :40] = 0
        decoded = sae.decode(acts)
        if kind != "jump":  # whose gradient then is an error of the library's own
            decoded.square().sum().backward()
        return decoded + 0, gradients(sae)

    assert_alike(*reversed(with_and_without(run, "fallback")))
    assert any("changed in place" in why for _, why in adapter.status().refused)


@every_dictionary
@pytest.mark.parametrize("look", ["hook", "retain", "grad"])
def test_gradients_of_activations(kind, look):
    def run():
        sae, seen = dictionary(kind), []
        acts = sae.encode(tokens())
        if look == "hook":
            acts.register_hook(lambda grad: seen.append(grad) or grad * 2)
        elif look == "retain":
            acts.retain_grad()
        decoded = sae.decode(acts if look != "grad" else acts * 1)
        if look == "grad":
            seen.append(torch.autograd.grad(decoded.square().sum(), acts, retain_graph=True)[0])
        decoded.square().sum().backward()
        if look == "retain":
            seen.append(acts.grad)
        return decoded, seen, gradients(sae)

    assert_alike(*reversed(with_and_without(run, "fallback")))


@pytest.mark.parametrize("kind", ["topk", "batch", "matryoshka"])
def test_gradient_of_pre_activations_is_seen(kind):
    def run():
        made = trainer(kind)
        made.num_tokens_since_fired[:20] = 10_000_000
        options = {"return_topk": True} if kind == "topk" else {"return_active": True, "use_threshold": False}
        *_, post = made.ae.encode(tokens(), **options)
        post.retain_grad()
        made.get_auxiliary_loss(tokens(seed=1), post).backward()
        return post.grad, gradients(made.ae)

    assert_alike(*reversed(with_and_without(run)))


@every_dictionary
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_modes(kind, mode):
    def run():
        with mode():
            sae = dictionary(kind)
            return [t + 0 for t in sae(tokens(), output_features=True)]

    assert_alike(*reversed(with_and_without(run, "fallback")))


@every_dictionary
def test_copies_and_pickles(kind):
    with adapter.apply(least_work=0, on_refuse="raise"):
        sae = dictionary(kind)
        right = sae(tokens())
        assert_alike(copy.deepcopy(sae)(tokens()), right)
        assert_alike(pickle.loads(pickle.dumps(sae))(tokens()), right)
        acts = sae.encode(tokens())
        assert code_of(acts) is not None
        assert code_of(copy.deepcopy(acts.detach())) is None
        file = io.BytesIO()
        torch.save(sae.state_dict(), file)
    file.seek(0)
    fresh = dictionary(kind)
    fresh.load_state_dict(torch.load(file))
    assert_alike(fresh(tokens()), right)


@every_dictionary
def test_autocast(kind):
    x = tokens(dtype=torch.float32)

    def run():
        sae = dictionary(kind, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            decoded, acts = sae(x, output_features=True)
            decoded.square().mean().backward()
        return acts, decoded, gradients(sae)

    (acts, decoded, grads), ours = with_and_without(run, "fallback")
    assert ours[0].dtype == acts.dtype
    assert ours[1].dtype == decoded.dtype
    same = ((ours[0] > 0) == (acts > 0)).all(dim=1)  # rows of the same picks
    assert same.float().mean() > 0.6
    assert_alike(ours[1][same], decoded[same], 0.05)
    for name in grads:
        assert (ours[2][name] is None) == (grads[name] is None)
        assert grads[name] is None or ours[2][name].dtype == torch.float32


@every_dictionary
@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_compiled_it_is_the_librarys_own(kind):
    sae, x = dictionary(kind), tokens()
    right = sae(x)
    with adapter.apply(least_work=0, on_refuse="raise"):
        torch._dynamo.reset()
        before = served()
        assert_alike(torch.compile(sae, backend="eager")(x), right)
        assert served() == before


@every_dictionary
def test_transformed_it_is_the_librarys_own(kind):
    sae, x = dictionary(kind), tokens()

    def loss(parameters, x):
        return torch.func.functional_call(sae, parameters, (x,)).square().mean()

    right = torch.func.grad(loss)(dict(sae.named_parameters()), x)
    with adapter.apply(least_work=0, on_refuse="raise"):
        before = served()
        assert_alike(torch.func.grad(loss)(dict(sae.named_parameters()), x), right)
        assert served() == before
        loss(dict(sae.named_parameters()), x).backward()
        assert served() > before


@every_dictionary
def test_hooks_on_layers_are_called(kind):
    sae, seen = dictionary(kind), []
    if kind in ("matryoshka", "jump"):
        sae.register_forward_hook(lambda *_: seen.append(1))
    else:
        sae.encoder.register_forward_hook(lambda *_: seen.append(1))
    right = sae(tokens())
    with adapter.apply(least_work=0):
        assert_alike(sae(tokens()), right)
    assert len(seen) == 2


# Trainers.


@every_trainer
@pytest.mark.parametrize("logging", [False, True])
@pytest.mark.parametrize("dead", [0, 3, 60])
def test_loss(kind, logging, dead):
    def run():
        made = trainer(kind)
        made.num_tokens_since_fired[:dead] = 10_000_000
        found = made.loss(tokens(), step=5, logging=logging)
        loss = found.losses["loss"] if logging else found
        if not logging:
            found.backward()
        told = made.get_logging_parameters()
        state = made.num_tokens_since_fired, made.ae.threshold, told
        fields = found._asdict() if logging else loss
        return fields, state, {} if logging else gradients(made.ae)

    without, ours = with_and_without(run)
    assert_alike(ours, without, SINGLE_L0 if kind == "jump" else EXACT)


@pytest.mark.parametrize("kind", ["topk", "batch", "matryoshka"])
def test_tokens_of_less_precision(kind):
    def run():
        made = trainer(kind)
        loss = made.loss(tokens(dtype=torch.bfloat16), step=5)
        loss.backward()
        return loss, gradients(made.ae)

    assert_alike(*reversed(with_and_without(run)))


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_matryoshka_with_fewer_groups(groups):
    def run():
        made = trainer("matryoshka")
        made.group_weights = [0.5, 0.2, 0.3]
        made.ae.active_groups = groups
        loss = made.loss(tokens(), step=5)
        loss.backward()
        return loss, made.num_tokens_since_fired, gradients(made.ae)

    assert_alike(*reversed(with_and_without(run)))


@pytest.mark.parametrize("threshold", [-0.3, -0.02, 0.0, 0.03, 0.3, 2.0])
def test_jump_counts_zeros_near_a_threshold(threshold):
    def run():
        made = trainer("jump", bandwidth=0.1)
        made.ae.threshold.data.fill_(threshold)
        made.ae.b_enc.data -= 2.0 if threshold < 1 else 0.0
        loss = made.loss(tokens(), step=5)
        loss.backward()
        return loss, made.num_tokens_since_fired, gradients(made.ae)

    without, ours = with_and_without(run)
    assert_alike(ours, without, SINGLE_L0)
    assert without[2]["threshold"].any()


def state_of(made) -> dict[str, dict]:
    """All that a run goes on from."""
    state = {name: getattr(made, name).state_dict() for name in ("ae", "optimizer", "scheduler")}
    return state | {"fired": made.num_tokens_since_fired}


def load(made, state: dict[str, dict]) -> None:
    for name in ("ae", "optimizer", "scheduler"):
        getattr(made, name).load_state_dict(state[name])
    made.num_tokens_since_fired = state["fired"]


def updated(made, steps: range, dtype: torch.dtype = torch.float64) -> list[float]:
    """The losses of these steps."""
    return [made.update(step, tokens(seed=step, dtype=dtype)) for step in steps]


@every_trainer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("relayout", [False, True])
def test_training(kind, dtype, relayout):
    if relayout and kind in ("matryoshka", "jump"):
        pytest.skip("its weights lie so already")
    double = dtype == torch.float64
    steps = range(STEPS if double else 20)  # in single precision picks begin to differ

    def run():
        made = trainer(kind, dtype, len(steps))
        if relayout and adapter.LIBRARY.status().applied:
            adapter.relayout_(made.ae)
        losses = updated(made, steps, dtype)
        strides = {name: tensor.stride() for name, tensor in made.ae.state_dict().items()}
        return losses, made.ae.state_dict(), made.get_logging_parameters(), {} if relayout else strides

    without, ours = with_and_without(run)
    assert_alike(ours, without, 1e-7 if double else 1e-3)
    assert len(set(without[0])) == len(steps)
    site = {
        "topk": "TopKTrainer.get_auxiliary_loss",
        "batch": "BatchTopKTrainer.get_auxiliary_loss",
        "matryoshka": "MatryoshkaBatchTopKTrainer.get_auxiliary_loss",
        "jump": "JumpReluTrainer.loss",
    }[kind]
    assert sum(n for name, n in adapter.status().served.items() if name.endswith(site)) >= len(steps)


@every_trainer
@pytest.mark.parametrize("ours_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"relayout": True, "fused_adam": True}], ids=["plain", "options"])
def test_a_run_that_changes_sides(kind, options, ours_first):
    """By its state, which either side has saved."""
    whole = trainer(kind, steps=STEPS)
    losses, half = updated(whole, range(STEPS)), STEPS // 2
    sides = [lambda: adapter.apply(least_work=0, on_refuse="raise", **options), nullcontext]
    first, last = sides if ours_first else reversed(sides)
    with first():
        begun = trainer(kind, steps=STEPS)
        found = updated(begun, range(half))
        torch.save(state_of(begun), file := io.BytesIO())
    file.seek(0)
    with last():
        other = trainer(kind, steps=STEPS)
        load(other, torch.load(file))
        found += updated(other, range(half, STEPS))
    assert_alike([found, state_of(other)], [losses, state_of(whole)], 1e-7)


@every_trainer
@pytest.mark.parametrize(
    ("relayout", "fused_adam"),
    [(True, False), (False, True), (True, True)],
    ids=["laid", "fused", "both"],
)
def test_options_of_trainers(kind, relayout, fused_adam, monkeypatch):
    called, fused = [], torch._fused_adam_
    monkeypatch.setattr(torch, "_fused_adam_", lambda *a, **k: (called.append(1), fused(*a, **k))[1])
    theirs = trainer(kind, steps=30)
    losses = updated(theirs, range(20))
    with adapter.apply(least_work=0, on_refuse="raise", relayout=relayout, fused_adam=fused_adam):
        ours = trainer(kind, steps=30)
        assert_alike(updated(ours, range(20)), losses, 1e-7)
    assert len(called) == fused_adam * 20
    assert_alike(state_of(ours), state_of(theirs), 1e-7)
    for parameter in ours.ae.parameters():
        moment = ours.optimizer.state[parameter]["exp_avg"]
        assert moment.stride() == parameter.stride()
    # It goes on without our ops, and copies are as the library makes them.
    assert_alike(updated(ours, range(20, 25)), updated(theirs, range(20, 25)), 1e-7)
    assert_alike(state_of(ours), state_of(theirs), 1e-7)
    sae, optimizer = copy.deepcopy((ours.ae, ours.optimizer))
    assert optimizer.param_groups[0]["fused"] is None
    if not relayout or kind in ("matryoshka", "jump"):
        return
    for one in (ours.ae, sae):
        for assign in (False, True):
            one.load_state_dict(theirs.ae.state_dict(), assign=assign)
            assert one.encoder.weight.stride() == (D, 1)
            assert one.decoder.weight.stride() == (1, D)
            assert all(tensor.is_contiguous() for tensor in one.state_dict().values())
            assert_alike(one.state_dict(), theirs.ae.state_dict())


@every_trainer
def test_training_under_autocast(kind):
    def run():
        made = trainer(kind, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            losses = [made.update(step, tokens(seed=step, dtype=torch.float32)) for step in range(8)]
        return losses, {name: p.dtype for name, p in made.ae.state_dict().items()}

    assert_alike(*reversed(with_and_without(run, "fallback")), 0.05)
    assert served()


@every_dictionary
def test_made_of_a_seed(kind):
    def run():
        torch.manual_seed(5)
        made = raw_dictionary(kind)
        return made.state_dict(), [parameter.stride() for parameter in made.parameters()]

    assert_alike(*reversed(with_and_without(run)), SINGLE)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_atoms_at_norm_1(layout, dtype):
    from dictionary_learning.trainers import trainer as theirs

    def run():
        weight, grad = tokens(M, seed=1, dtype=dtype).T, tokens(M, seed=2, dtype=dtype).T
        if layout == "rows":
            weight, grad = weight.contiguous(), grad.contiguous()
        weight = torch.nn.Parameter(weight)
        along = theirs.remove_gradient_parallel_to_decoder_directions(weight, grad, D, M)
        assert along is grad
        data = theirs.set_decoder_norm_to_unit_norm(weight, D, M)
        assert data.data_ptr() == weight.data_ptr()
        return along, data, data.stride()

    within = {torch.float64: EXACT, torch.float32: SINGLE, torch.bfloat16: 0.01}[dtype]
    assert_alike(*reversed(with_and_without(run, "fallback")), within)
    assert ("half precision" in refusals()) == (dtype == torch.bfloat16)
    with adapter.apply(), pytest.raises(AssertionError):
        theirs.set_decoder_norm_to_unit_norm(torch.nn.Parameter(tokens(M)), D, M)


def test_pre_activations_are_not_made():
    made = trainer("topk")
    with adapter.apply(least_work=0, on_refuse="raise"):
        for kept in (0, 20):
            made.num_tokens_since_fired[:kept] = 10_000_000
            *_, post = made.ae.encode(tokens(), return_topk=True)
            made.get_auxiliary_loss(tokens(seed=1), post).backward() if kept else None
            assert post.computed is None
        made.ae.b_dec.data += 1
        with torch.no_grad():
            made.ae.encoder.weight.add_(1)
        with pytest.raises(RuntimeError, match=r"weight has been changed in place"):
            post.sum()


# What is refused.


def encode(sae, x):
    return sae.encode(x)


def by_threshold(sae, x):
    return sae.encode(x, use_threshold=True)


def in_layers(sae):
    sae.encoder = torch.nn.Sequential(sae.encoder)


def its_own_forward(sae):
    weight = sae.encoder.weight
    sae.encoder.forward = lambda x: x @ weight.T


@pytest.mark.parametrize(
    ("change", "call", "why"),
    [
        (lambda sae: sae.k.fill_(25), encode, "k > M / 4"),
        (lambda sae: sae.k.fill_(0), encode, "k < 1"),
        (lambda sae: sae.encoder.register_forward_hook(print), encode, "hooks"),
        (lambda sae: sae.encoder.register_full_backward_hook(print), encode, "hooks"),
        (in_layers, encode, "a layer is not an nn.Linear"),
        (its_own_forward, encode, "a layer is not an nn.Linear"),
        (lambda sae: sae, lambda sae, x: sae.encode(x, True, True), "use_threshold and return_topk"),
        (lambda sae: sae.threshold.fill_(-1), by_threshold, "codes are not sparse"),
        (lambda sae: sae.threshold.fill_(torch.nan), by_threshold, "a threshold is NaN"),
        (lambda sae: sae, lambda sae, x: sae.decode(x.repeat(1, 6)), "activations: not made of a code"),
    ],
)
def test_refused(change, call, why, capsys):
    sae, x = dictionary("topk"), tokens()
    change(sae)
    right = call(sae, x)
    with adapter.apply(least_work=0):
        assert_alike(call(sae, x), right)
        assert why in refusals()
    with (
        adapter.apply(least_work=0, on_refuse="raise"),
        pytest.raises(RuntimeError, match="served by the lib"),
    ):
        call(sae, x)


def test_little_work_is_the_librarys_own():
    sae = dictionary("topk")
    with adapter.apply():
        sae(tokens())
    assert "little work" in refusals()


def test_errors_are_the_librarys_own():
    sae = dictionary("topk", torch.float32)
    with pytest.raises(RuntimeError) as theirs:
        sae.encode(tokens())
    with adapter.apply(least_work=0), pytest.raises(RuntimeError) as ours:
        sae.encode(tokens())
    assert str(ours.value) == str(theirs.value)


@every_trainer
@pytest.mark.parametrize("method", ["encode", "decode", "update_threshold", "get_auxiliary_loss"])
@pytest.mark.parametrize("how", ["subclass", "patch"])
def test_methods_of_others_are_called(kind, method, how, monkeypatch):
    of_trainer = method not in ("encode", "decode")
    if (of_trainer and kind == "jump") or (kind, method) in (("matryoshka", "decode"), ("jump", "encode")):
        pytest.skip("the library has none, or doesn't call it")

    def run():
        made, called = trainer(kind), []
        made.num_tokens_since_fired[:20] = 10_000_000
        owner = made if of_trainer else made.ae
        theirs = getattr(type(owner), method)

        def other(self, *args, **kwargs):
            called.append(method)
            return theirs(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            if how == "patch":
                patch.setattr(type(owner), method, other)
            else:
                owner.__class__ = type("Other", (type(owner),), {method: other})
            return made.loss(tokens(), step=5), called

    without, ours = with_and_without(run, "fallback")
    assert_alike(ours, without, SINGLE_L0 if kind == "jump" else EXACT)
    assert without[1]


@pytest.mark.parametrize("kind", ["topk", "batch"])
@pytest.mark.parametrize("layer", ["encoder", "decoder"])
def test_hooks_on_layers_of_a_trainer_are_called(kind, layer):
    def run():
        made, called = trainer(kind), []
        made.num_tokens_since_fired[:20] = 10_000_000
        getattr(made.ae, layer).register_forward_hook(lambda *_: called.append(layer))
        return made.loss(tokens(), step=5), called

    assert_alike(*reversed(with_and_without(run, "fallback")))


# Applied and undone.


def test_undo_leaves_nothing():
    changed = changed_by("dictionary_learning", partial(adapter.apply, relayout=True, fused_adam=True))
    assert len(changed) >= len(adapter.LIBRARY.sites + adapter.LIBRARY.options["relayout"])


@every_dictionary
def test_convert(kind):
    sae, other = dictionary(kind), dictionary(kind)
    right = sae(tokens())
    adapter.LIBRARY.least_work = 0
    assert adapter.convert(sae) is sae
    assert code_of(sae.encode(tokens())) is not None
    assert code_of(other.encode(tokens())) is None
    assert_alike(sae(tokens()), right)
    assert_alike(copy.deepcopy(sae)(tokens()), right)
    assert_alike(pickle.loads(pickle.dumps(sae))(tokens()), right)


def test_relayout_wants_linear_layers():
    with pytest.raises(TypeError, match=r"^relayout_: module must have an nn.Linear as encoder"):
        adapter.relayout_(dictionary("jump"))
