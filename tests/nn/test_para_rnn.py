"""ParaGRU and ParaLSTM: torch.nn.GRU's interface around the recurrences, and weights from elsewhere."""

import re

import pytest
import torch
from backends import host_backend_names, running
from oracle import random
from recurrences import GRU, LSTM, textbook

from fastsparse._options import SOLVERS
from fastsparse.nn import ParaGRU, ParaLSTM

TEXTBOOKS = {ParaGRU: GRU, ParaLSTM: LSTM}
kinds = pytest.mark.parametrize("kind", TEXTBOOKS)
everywhere = pytest.mark.usefixtures("backend")


@pytest.fixture(params=[host_backend_names()[0], host_backend_names()[-1]])
def backend(request):
    """Modules know no backend, and kernels have tests of their own: here the reference and one are enough."""
    with running(request.param):
        yield


def build(kind, *sizes, seed=0, **options):
    return kind(*sizes, generator=torch.Generator().manual_seed(seed), **options)


def parts(state) -> tuple[torch.Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def joined(states):
    """Parts of a state as a module takes them."""
    return states if len(states) > 1 else states[0]


@everywhere
@kinds
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_a_product_and_a_recurrence(kind, bias):
    module = build(kind, 6, 8, bias=bias)
    if bias:
        torch.nn.init.normal_(module.bias_l0)
    x, start = random(3, 20, 6, seed=1), tuple(random(1, 3, 8, seed=2 + i) for i in range(kind.states))
    u = torch.einsum("btd,ghd->btgh", x, module.weight_ih_l0) + (module.bias_l0 if bias else 0)
    weights = [module.get_parameter(f"{name}_l0") for name in kind.recurrent]
    right = TEXTBOOKS[kind].run(u, weights, tuple(part[0] for part in start))
    output, state = module(x, joined(start))
    torch.testing.assert_close(output, right[0])
    for part, states in zip(parts(state), right, strict=True):
        assert part.shape == (1, 3, 8)
        torch.testing.assert_close(part[0], states[:, -1])


@everywhere
@kinds
def test_layers_heads_and_layout(kind):
    """Two layers are one after the other; heads are modules of their own; time may come first."""
    deep = build(kind, 6, 8, 2, num_heads=2)
    x = random(3, 20, 6, seed=1)
    output, state = deep(x)
    h = x
    for layer in range(2):
        shape = deep.get_parameter(f"weight_ih_l{layer}").shape
        assert shape == (3, 8, (8 if layer else 6) // 2)
        heads = []
        for head in range(2):
            one = build(kind, shape[-1], 4)
            channels = slice(4 * head, 4 * head + 4)
            one.load_state_dict(
                {
                    name.replace(f"_l{layer}", "_l0"): value[:, channels]
                    for name, value in deep.state_dict().items()
                    if name.endswith(f"_l{layer}")
                }
            )
            heads.append(one(h.chunk(2, dim=-1)[head]))
        h = torch.cat([out for out, _ in heads], dim=-1)
        for part, *found in zip(parts(state), *(parts(last) for _, last in heads), strict=True):
            torch.testing.assert_close(part[layer], torch.cat(found, dim=-1)[0])
    torch.testing.assert_close(output, h)

    late = build(kind, 6, 8, 2, num_heads=2, batch_first=False)
    late.load_state_dict(deep.state_dict())
    other, _ = late(x.transpose(0, 1))
    torch.testing.assert_close(other.transpose(0, 1), output)


@everywhere
@kinds
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_decoding_step_by_step(kind, batch_first, solver):
    """Any prefix can be read at once, and gone on with one step at a time."""
    module = build(kind, 6, 8, 2, batch_first=batch_first, solver=solver)
    x = random(3, 9, 6, seed=1)
    output, state = module(x if batch_first else x.transpose(0, 1))
    output = output if batch_first else output.transpose(0, 1)
    _, now = module(x[:, :4] if batch_first else x.transpose(0, 1)[:4])
    torch.testing.assert_close(module.step(x[:, 0])[0], output[:, 0])
    for t in range(4, 9):
        h, now = module.step(x[:, t], now)
        torch.testing.assert_close(h, output[:, t])
    for part, other in zip(parts(now), parts(state), strict=True):
        torch.testing.assert_close(part, other)
    nothing, same = module(x[:, :0] if batch_first else x.transpose(0, 1)[:0], now)
    assert 0 in nothing.shape
    assert all(torch.equal(*pair) for pair in zip(parts(same), parts(now), strict=True))


@everywhere
@kinds
def test_sequences_of_many_lengths(kind):
    module = build(kind, 6, 8, 2)
    x, spans = random(1, 12, 6, seed=1), torch.tensor([0, 5, 5, 12])
    start = tuple(random(2, 3, 8, seed=2 + i) for i in range(kind.states))
    output, state = module(x, joined(start), cu_seqlens=spans)
    for s, (first, last) in enumerate([(0, 5), (5, 5), (5, 12)]):
        alone = joined(tuple(part[:, s : s + 1] for part in start))
        right, end = module(x[:, first:last], alone)
        torch.testing.assert_close(output[:, first:last], right)
        for part, other in zip(parts(state), parts(end), strict=True):
            torch.testing.assert_close(part[:, s : s + 1], other)


@everywhere
@kinds
@pytest.mark.parametrize("lengths", [None, (3, 2), (5, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_autocast(kind, dtype, lengths):
    """All that comes out is of its dtype, however it went in; for fp64 PyTorch has no autocast."""
    module, x = build(kind, 6, 8, 2), random(1, 5, 6, seed=1)
    spans = None if lengths is None else torch.tensor((0, *lengths)).cumsum(0)
    start = tuple(random(2, len(lengths or "1"), 8, seed=2 + i) for i in range(kind.states))
    right, _ = module(x, None if dtype is None else joined(start), cu_seqlens=spans)
    cast = None if dtype is None else joined(tuple(part.to(dtype) for part in start))
    with torch.autocast("cpu", torch.bfloat16):
        for steps in (5, 0) if lengths is None else (5,):
            output, state = module(x[:, :steps], cast, cu_seqlens=spans)
            assert {part.dtype for part in (output, *parts(state))} == {torch.bfloat16}
            torch.testing.assert_close(output.float(), right[:, :steps], rtol=0.05, atol=0.05)
        output, state = module.double()(x.double(), cu_seqlens=spans)
        assert {part.dtype for part in (output, *parts(state))} == {torch.float64}


@everywhere
@kinds
def test_gradients_reach_everything(kind):
    module = build(kind, 4, 6, 2, dtype=torch.float64)
    x = random(2, 5, 4, seed=1, dtype=torch.float64).requires_grad_()
    start = tuple(
        random(2, 2, 6, seed=2 + i, dtype=torch.float64).requires_grad_() for i in range(kind.states)
    )

    def through(*_):
        output, state = module(x, joined(start))
        return output.sin(), *(part.cos() for part in parts(state))

    assert torch.autograd.gradcheck(through, (x, *start, *module.parameters()), fast_mode=True)


@kinds
def test_initial_weights(kind):
    module = build(kind, 64, 400, num_heads=4)
    assert module.bias_l0[0].tolist() == sorted(module.bias_l0[0].tolist(), reverse=True)
    assert module.bias_l0[0, [0, -1]].tolist() == [0, -1]
    assert not module.bias_l0[1:].any()
    bound = (6 / (16 + 100)) ** 0.5
    assert 0.99 * bound < module.weight_ih_l0.abs().max() <= bound
    for name in kind.recurrent:
        assert getattr(module, f"{name}_l0").std().item() == pytest.approx(2 / 2000**0.5, rel=0.1)
    again, other = (build(kind, 64, 400, num_heads=4, seed=seed) for seed in (0, 1))
    assert all(torch.equal(*pair) for pair in zip(module.parameters(), again.parameters(), strict=True))
    assert not torch.equal(module.weight_hh_l0, other.weight_hh_l0)


@kinds
def test_dropout_is_between_layers_and_in_training(kind):
    x = random(2, 5, 4, seed=1)
    module = build(kind, 4, 6, 2, dropout=1.0)
    plain = build(kind, 4, 6, 2)
    assert not torch.equal(module(x)[0], plain(x)[0])
    torch.testing.assert_close(module(x)[0], module(torch.zeros_like(x))[0])
    assert torch.equal(module.eval()(x)[0], plain(x)[0])
    one = build(kind, 4, 6, dropout=1.0)
    assert torch.equal(one(x)[0], build(kind, 4, 6)(x)[0])


def of_ml_pararnn(kind, heads, inputs, H) -> dict[str, torch.Tensor]:
    """Weights as ml-pararnn names and lays them out."""
    weights = {
        "A": random(3, H, seed=1, scale=0.5),
        "B": random(heads, inputs // heads, 3, H // heads, seed=2),
        "b": random(3, H, seed=3),
    }
    return weights | ({"C": random(2, H, seed=4, scale=0.5)} if kind is ParaLSTM else {})


@everywhere
@kinds
@pytest.mark.parametrize("heads", [1, 2])
def test_weights_of_ml_pararnn(kind, heads):
    """Held against the textbook, of a product written out; both order their gates as we do."""
    w, x = of_ml_pararnn(kind, heads, 6, 8), random(2, 15, 6, seed=20)
    output, _ = kind.from_ml_pararnn(w)(x)
    u = torch.einsum("btni,nigj->btgnj", x.unflatten(-1, (heads, -1)), w["B"]).flatten(-2) + w["b"]
    right = textbook(TEXTBOOKS[kind], u, [w[name] for name in ("A", "C") if name in w])
    torch.testing.assert_close(output, right[0])


@kinds
def test_layers_of_ml_pararnn(kind):
    first, second, x = of_ml_pararnn(kind, 2, 6, 8), of_ml_pararnn(kind, 2, 8, 8), random(2, 15, 6, seed=20)
    output, _ = kind.from_ml_pararnn(first, second, solver="shooting")(x)
    torch.testing.assert_close(output, kind.from_ml_pararnn(second)(kind.from_ml_pararnn(first)(x)[0])[0])
    other = of_ml_pararnn(ParaLSTM if kind is ParaGRU else ParaGRU, 2, 6, 8)
    names = "A, B, C, b" if kind is ParaLSTM else "A, B, b"
    flat, narrow, turned = {"B": first["B"][0]}, {"A": first["A"][:, :4]}, {"b": first["b"].T}
    for bad, error, message in [
        *(
            (layers, ValueError, f"each state_dict must hold {names}, got ")
            for layers in ((), (other,), (first, other), (first | {"D": first["A"]},))
        ),
        ((first, first), ValueError, "B of layer 1 must have shape (heads, ., 3, H / heads) = (2, 4, 3, 4)"),
        ((first | flat,), ValueError, "B must have shape (heads, D / heads, 3, H / heads), got shape (3, 3"),
        ((first | narrow,), ValueError, "A of layer 0 must have shape (3, H) = (3, 8), got shape (3, 4)"),
        ((first | turned,), ValueError, "b of layer 0 must have shape (3, H) = (3, 8), got shape (8, 3)"),
        (([first, second],), TypeError, "state_dicts must be dicts of tensors, one for each layer, got list"),
    ]:
        with pytest.raises(error, match=f"^{kind.__name__}.from_ml_pararnn: {re.escape(message)}"):
            kind.from_ml_pararnn(*bad)
    half = {name: weight.bfloat16() for name, weight in first.items()}
    assert {weight.dtype for weight in kind.from_ml_pararnn(half).parameters()} == {torch.bfloat16}
    assert kind.from_ml_pararnn(half, dtype=torch.float32).weight_hh_l0.dtype == torch.float32


def foreign(kind, inputs, H, prefix="") -> dict[str, torch.Tensor]:
    """Weights as pararnn-torch 0.17 names and orders them."""
    names = ["a_z", "a_r", "a_n"] if kind is ParaGRU else ["a_f", "a_z", "a_o", "c_f", "c_o"]
    weights = {prefix + name: random(H, seed=i, scale=0.5) for i, name in enumerate(names)}
    weights[f"{prefix}W_x.weight"] = random(3 * H, inputs, seed=8)
    weights[f"{prefix}W_x.bias"] = random(3 * H, seed=9)
    return weights


@everywhere
@kinds
@pytest.mark.parametrize("cap", [0.5, None])
def test_weights_of_pararnn_torch(kind, cap):
    """Held against the textbook: recurrent weights are clamped; of its products an LSTM has f, z, o."""
    weights, x = foreign(kind, 5, 7), random(2, 15, 5, seed=20)
    output, _ = kind.from_pararnn_torch(weights, max_recurrent_norm=cap)(x)
    w = {n: v if cap is None or "W" in n else v.clamp(-cap, cap) for n, v in weights.items()}
    u = (x @ w["W_x.weight"].T + w["W_x.bias"]).unflatten(-1, (3, 7))
    rows = [["a_z", "a_r", "a_n"]] if kind is ParaGRU else [["a_f", "a_o", "a_z"], ["c_f", "c_o"]]
    u = u if kind is ParaGRU else u[:, :, [0, 2, 1]]
    right = textbook(TEXTBOOKS[kind], u, [torch.stack([w[name] for name in names]) for names in rows])
    torch.testing.assert_close(output, right[0])


@kinds
def test_layers_of_pararnn_torch(kind):
    first, second = foreign(kind, 5, 7), foreign(kind, 7, 7)
    both = foreign(kind, 5, 7, "layers.0.") | foreign(kind, 7, 7, "layers.1.")
    x = random(2, 15, 5, seed=20)
    output, _ = kind.from_pararnn_torch(both, batch_first=False)(x.transpose(0, 1))
    right = kind.from_pararnn_torch(second)(kind.from_pararnn_torch(first)(x)[0])[0]
    torch.testing.assert_close(output.transpose(0, 1), right)
    other = foreign(ParaLSTM if kind is ParaGRU else ParaGRU, 5, 7)
    weight, a_z, hold = first["W_x.weight"], first["a_z"], "state_dict must hold W_x"
    for bad, options, error, message in [
        *(
            (given, {}, ValueError, hold)
            for given in ({}, other, first | {"A_z": a_z}, {"W_x.weight": weight})
        ),
        (first | {"W_x.weight": weight[0]}, {}, ValueError, "W_x.weight must have shape (3 H, D), got"),
        (first | {"W_x.weight": weight[1:]}, {}, ValueError, "W_x.weight must have shape (3 H, D) = (18, 5)"),
        (first | {"a_z": a_z[1:]}, {}, ValueError, "a_z must have shape (H,) = (7,), got shape (6,)"),
        ([first], {}, TypeError, "state_dict must be a dict of tensors, got list"),
        (first, {"max_recurrent_norm": -1.0}, ValueError, "max_recurrent_norm must be finite and at least 0"),
    ]:
        with pytest.raises(error, match=f"^{kind.__name__}.from_pararnn_torch: {re.escape(message)}"):
            kind.from_pararnn_torch(bad, **options)
    double = {name: weight.double() for name, weight in first.items()}
    assert {weight.dtype for weight in kind.from_pararnn_torch(double).parameters()} == {torch.float64}


@kinds
def test_bad_arguments(kind):
    for sizes, options, error, message in [
        ((0, 8), {}, ValueError, "input_size must be at least 1, got input_size=0"),
        ((6, 8.0), {}, TypeError, "hidden_size must be an int, got 8.0"),
        ((6, 8), {"num_heads": 4}, ValueError, "num_heads must divide input_size and hidden_size (6 and 8)"),
        ((6, 8), {"dropout": 1.5}, ValueError, "dropout must be in [0, 1], got 1.5"),
        ((6, 8), {"dropout": -0.5}, ValueError, "dropout must be finite and at least 0, got dropout=-0.5"),
        ((6, 8), {"dropout": "a"}, TypeError, "dropout must be a float, got 'a' of type str"),
        ((6, 8), {"dropout": None}, TypeError, "dropout must be a float, got None of type NoneType"),
        ((6, 8), {"bias": 0}, TypeError, "bias must be a bool, got 0 of type int"),
        ((6, 8), {"batch_first": "no"}, TypeError, "batch_first must be a bool, got 'no' of type str"),
        ((6, 8), {"solver": "fast"}, ValueError, "solver must be one of auto, sequential, newton, shooting"),
    ]:
        with pytest.raises(error, match=f"^{kind.__name__}: {re.escape(message)}"):
            kind(*sizes, **options)
    module, x = build(kind, 6, 8), torch.zeros(2, 5, 6)
    late = build(kind, 6, 8, batch_first=False)
    state = [torch.zeros(1, 2, 8)] * kind.states
    step, packed = module.step, torch.tensor([0, 5])
    wrong_types = [
        (lambda: module(x.int()), "x must be float32"),
        (lambda: step(x[:, 0].int()), "x must be float32"),
        (lambda: module(x[:1], cu_seqlens=[0, 5]), "cu_seqlens must be a torch.Tensor, got list"),
    ]
    of_weight, at_once = "must have the dtype of weight_ih_l0", "must have B = 1 with cu_seqlens"
    autocast = torch.autocast("cpu", torch.bfloat16)
    wrong_values = [
        (lambda: module(x[0]), "x must have shape (B, T, D) with D = 6, got shape (5, 6)"),
        (lambda: module(x[..., :4]), "x must have shape (B, T, D) with D = 6, got shape (2, 5, 4)"),
        (lambda: step(x), "x must have shape (B, D) with D = 6, got shape (2, 5, 6)"),
        (lambda: step(x[0, 0]), "x must have shape (B, D) with D = 6, got shape (6,)"),
        (lambda: module(x, joined([part[:, :1] for part in state])), "state must have shape"),
        (lambda: module(x.double()), f"x {of_weight} (float32), got float64"),
        (lambda: autocast(module)(x.double()), f"x {of_weight} (bfloat16), got float64"),
        (lambda: step(x[:, 0].half()), f"x {of_weight} (float32), got float16"),
        (lambda: module(x, joined([part.double() for part in state])), f"state {of_weight} (float32), got"),
        (lambda: module(x[:1], cu_seqlens=packed - 1), "cu_seqlens must go from 0 to T = 5, got one from -1"),
        (lambda: module(x, joined(state), cu_seqlens=packed), f"x {at_once}"),
        (lambda: late(x.transpose(0, 1), cu_seqlens=packed), f"x.transpose(0, 1) {at_once}"),
    ]
    for error, cases in (TypeError, wrong_types), (ValueError, wrong_values):
        for call, message in cases:
            with pytest.raises(error, match=f"^{kind.__name__}: {re.escape(message)}"):
                call()
    if kind is ParaLSTM:
        with pytest.raises(TypeError, match=re.escape("ParaLSTM: state must be a pair (h, c), got Tensor")):
            module(x, state[0])
