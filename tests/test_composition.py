"""Every op inside PyTorch's machinery: gradcheck, opcheck, torch.compile, torch.export, autocast, vmap."""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from backends import host_backend_names, running
from oracle import laid_out, random, random_indices
from samples import CORE, SAMPLES, SMALL, calls, tensors
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import fastsparse
from fastsparse.ops._library import OPS

N, k, M, D, T = SMALL.N, SMALL.k, SMALL.M, SMALL.D, SMALL.T
FUNCTIONS = {name: (sample.__call__, sample.inputs) for name, sample in CORE.items()}
CODE = random_indices(N, k, M, seed=9)
functions = pytest.mark.parametrize("name", CORE)
COUNTED = [name for name, sample in SAMPLES.items() if sample.counted]
FIRST_AND_LAST = host_backend_names()[0], host_backend_names()[-1]
first_and_last = pytest.mark.parametrize("named", FIRST_AND_LAST)
ONCE = ("matching_pursuit", "gru_recurrence", "lstm_recurrence", "poly")  # their gradients have none
SCORES = "threshold_encode"  # comes out as it was compared, in fp32
twice = pytest.mark.parametrize("name", [name for name in CORE if not name.startswith(ONCE)])

# PyTorch's compiler, forward mode, linearization, vmap and opcheck warn of what they do themselves.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:Attempted to insert a get_attr Node:UserWarning",
    "ignore:torch.searchsorted:UserWarning",
)


@pytest.fixture
def _fresh_compiler(tmp_path, monkeypatch):
    # PyTorch's cache on disk would bring back an earlier state of our gradients.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()


@functions
def test_gradcheck(backend, name):
    function, inputs = FUNCTIONS[name]
    assert torch.autograd.gradcheck(function, tensors(*inputs, dtype=torch.float64))


@twice
def test_gradgradcheck(backend, name):
    function, inputs = FUNCTIONS[name]
    leaves, slow = tensors(*inputs, dtype=torch.float64), backend == "triton-interpreted"
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=slow)  # along random directions


@pytest.mark.parametrize("name", [name for name in CORE if name != "batch_topk_encode"])  # which keeps one
def test_gradcheck_of_an_empty_batch(backend, name):
    function, inputs = FUNCTIONS[name]
    leaves = tensors(*inputs, tokens=0)
    function(*leaves).sum().backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    overload = getattr(torch.ops.fastsparse, op).default
    for dtype, layout in ((torch.float32, "contiguous"), (torch.bfloat16, "transposed")):
        tolerance = {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else {}
        for arguments in calls(dtype=dtype)[op]:
            given = [
                laid_out(value, layout if value.dim() == 2 else "contiguous").requires_grad_(
                    OPS[op].differentiable and value.is_floating_point()
                )
                if isinstance(value, torch.Tensor)
                else value
                for value in arguments
            ]
            torch.library.opcheck(overload, tuple(given), **tolerance)


def autoencoder(x, weight, bias, decoder):
    """A whole TopK autoencoder, as users compile it."""
    code = fastsparse.topk_encode(x, weight, bias, k=k)
    return fastsparse.sparse_decode(*code, decoder)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_with_a_changing_number_of_tokens(compiler):
    compiled = torch.compile(autoencoder, fullgraph=True, dynamic=True, backend=compiler)
    for tokens in (7, 5, 64, 33):
        leaves = tensors("x", "weight", "bias", tokens=tokens)
        inputs = [[leaf.detach().clone().requires_grad_() for leaf in (*leaves, leaves[1])] for _ in range(2)]
        with torch.compiler.set_stance("default" if tokens == 7 else "fail_on_recompile"):
            outs = [run(*leaves) for run, leaves in zip((compiled, autoencoder), inputs, strict=True)]
        torch.testing.assert_close(outs[0], outs[1])
        for out in outs:
            out.square().sum().backward()
        for mine, theirs in zip(*inputs, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_a_pursuit_with_a_changing_number_of_tokens():
    """Forward, backward and options, without a break in the graph and compiled once."""

    def pursue(x, dictionary):
        pursuit = fastsparse.matching_pursuit(x, dictionary, k=k, tol=0.1, normalized=True, method="gram")
        return pursuit.values.sum() + pursuit.residual.square().sum()

    compiled = torch.compile(pursue, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (7, 5, 64, 33):
        x, dictionary = tensors("x", "weight", tokens=tokens)
        dictionary = torch.nn.functional.normalize(dictionary.detach(), dim=1)
        inputs = [[leaf.detach().clone().requires_grad_() for leaf in (x, dictionary)] for _ in range(2)]
        with torch.compiler.set_stance("default" if tokens == 7 else "fail_on_recompile"):
            outs = [run(*leaves) for run, leaves in zip((compiled, pursue), inputs, strict=True)]
        torch.testing.assert_close(*outs)
        grads = [torch.autograd.grad(out, leaves) for out, leaves in zip(outs, inputs, strict=True)]
        torch.testing.assert_close(*grads)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("solver", ["auto", "newton"])
def test_compile_recurrences_of_changing_sizes(solver):
    """Forward and backward, sequences of many lengths too, compiled once."""

    def recur(u, gates, peephole, spans):
        h = fastsparse.gru_recurrence(u, gates, solver=solver)
        packed = h.reshape(1, -1, 1, D).expand(-1, -1, 3, -1)
        h, c = fastsparse.lstm_recurrence(packed, gates, peephole, cu_seqlens=spans, solver=solver)
        return (h + fastsparse.linear_recurrence(c, h, cu_seqlens=spans, reverse=True)).square().sum()

    compiled = torch.compile(recur, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (7, 5, 12):
        u, *weights = tensors("u", "gates", "peephole", tokens=tokens)
        u = u.detach().repeat(1, tokens - 3, 1, 1)
        spans = torch.tensor([0, 2, 2, u.shape[0] * u.shape[1]])
        inputs = [[leaf.detach().clone().requires_grad_() for leaf in (u, *weights)] for _ in range(2)]
        with torch.compiler.set_stance("default" if tokens == 7 else "fail_on_recompile"):
            outs = [run(*leaves, spans) for run, leaves in zip((compiled, recur), inputs, strict=True)]
        torch.testing.assert_close(*outs)
        grads = [torch.autograd.grad(out, leaves) for out, leaves in zip(outs, inputs, strict=True)]
        torch.testing.assert_close(*grads)


@pytest.mark.skipif(not fastsparse.backends()["cpu"].available, reason="the reference takes lengths on trust")
@pytest.mark.parametrize("bounds", [[0], [0, 3], [1, 4], [0, 3, 2, 4], [0, 5]], ids=str)
def test_lengths_that_tracing_could_not_look_at_are_checked(bounds):
    x, spans = random(1, 4, D, seed=1), torch.tensor(bounds)
    u, gates = random(1, 4, 3, D, seed=2), random(3, D, seed=3)
    with pytest.raises(ValueError, match="linear_recurrence: cu_seqlens must go from 0 to T = 4"):
        torch.ops.fastsparse.linear_recurrence(x, x, None, False, spans)
    with pytest.raises(ValueError, match="linear_recurrence_backward: cu_seqlens must go from 0 to T = 4"):
        torch.ops.fastsparse.linear_recurrence_backward(x, None, False, spans, x, x, True, True, False)
    with pytest.raises(ValueError, match="gru_recurrence: cu_seqlens must go from 0 to T = 4"):
        torch.ops.fastsparse.gru_recurrence(u, gates, None, spans, 0)
    with pytest.raises(ValueError, match="gru_recurrence_backward: cu_seqlens must go from 0 to T = 4"):
        torch.ops.fastsparse.gru_recurrence_backward(u, gates, None, spans, x, x, True, True, False)


class JumpReLU(torch.nn.Module):
    """A ragged autoencoder, of as many entries as come out."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = map(torch.nn.Parameter, tensors("weight", "bias"))

    def forward(self, x):
        values, indices, offsets = fastsparse.threshold_encode(x, self.weight, self.bias, threshold=0.5)
        return fastsparse.sparse_decode(values, indices, self.weight, offsets=offsets)


@pytest.mark.usefixtures("_fresh_compiler")
@first_and_last
def test_compile_what_is_counted_at_runtime(named):
    module = JumpReLU()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with running(named):
        for tokens in (7, 5, 64):
            (x,) = tensors("x", tokens=tokens)
            with torch.compiler.set_stance("default" if tokens == 7 else "fail_on_recompile"):
                outs = [run(x) for run in (compiled, module)]
            torch.testing.assert_close(*outs)
            wanted = x, *module.parameters()
            torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), wanted) for out in outs))


def test_export_what_is_counted_at_runtime():
    module = JumpReLU()
    (x,) = tensors("x")
    exported = torch.export.export(module, (x.detach(),), dynamic_shapes=({0: torch.export.Dim("N")},))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {"fastsparse.threshold_encode.default", "fastsparse.spmm.default"} <= targets
    for tokens in (5, 8, 100):
        (x,) = tensors("x", tokens=tokens)
        torch.testing.assert_close(exported.module()(x), module(x))


@functions
@pytest.mark.usefixtures("_fresh_compiler")
@first_and_last
def test_compile_each(named, name):
    function, inputs = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with running(named):
        for tokens in (6, 9):
            leaves = tensors(*inputs, tokens=tokens)
            torch.testing.assert_close(compiled(*leaves), function(*leaves))


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_function_follows_the_backend():
    x, weight, bias = tensors("x", "weight", "bias")
    seen = []

    def record(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes])
        return graph

    compiled = torch.compile(autoencoder, fullgraph=True, backend=record)
    compiled(x, weight, bias, weight)
    with fastsparse.use_backend("reference"):
        compiled(x, weight, bias, weight)
    assert len(seen) == 2
    assert "fastsparse.topk_encode.default" in seen[0]
    assert "fastsparse.topk_encode.default" not in seen[1]


def test_export_with_a_changing_number_of_tokens():
    class Autoencoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias, self.decoder = map(
                torch.nn.Parameter, tensors("weight", "bias", "weight")
            )

        def forward(self, x):
            return autoencoder(x, self.weight, self.bias, self.decoder)

    module = Autoencoder()
    (x,) = tensors("x")
    exported = torch.export.export(module, (x.detach(),), dynamic_shapes=({0: torch.export.Dim("N")},))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {"fastsparse.topk_encode.default", "fastsparse.spmm.default"} <= targets
    for tokens in (5, 8, 100):
        (x,) = tensors("x", tokens=tokens)
        torch.testing.assert_close(exported.module()(x), module(x))


def test_export_a_pursuit_with_a_changing_number_of_tokens():
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            (self.dictionary,) = map(torch.nn.Parameter, tensors("weight"))

        def forward(self, x):
            return tuple(fastsparse.matching_pursuit(x, self.dictionary, k=k))

    module = Encoder()
    (x,) = tensors("x")
    exported = torch.export.export(module, (x.detach(),), dynamic_shapes=({0: torch.export.Dim("N")},))
    assert "fastsparse.matching_pursuit.default" in {str(node.target) for node in exported.graph.nodes}
    for tokens in (5, 8, 100):
        (x,) = tensors("x", tokens=tokens)
        torch.testing.assert_close(exported.module()(x), module(x))


def test_export_recurrences_of_changing_sizes():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gates, self.peephole = map(torch.nn.Parameter, tensors("gates", "peephole"))

        def forward(self, u):
            h = fastsparse.gru_recurrence(u, self.gates)
            return h, *fastsparse.lstm_recurrence(u, self.gates, self.peephole)

    module = Layer()
    sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}
    exported = torch.export.export(module, (tensors("u")[0].detach(),), dynamic_shapes=(sizes,))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {"fastsparse.gru_recurrence.default", "fastsparse.lstm_recurrence.default"} <= targets
    for tokens in (5, 8):
        u = tensors("u", tokens=tokens)[0].repeat(1, tokens, 1, 1)
        torch.testing.assert_close(exported.module()(u), module(u))


@functions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, name, dtype):
    function, inputs = FUNCTIONS[name]
    leaves = tensors(*inputs)
    halves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", dtype):
        out = function(*leaves)
    assert out.dtype == (torch.float32 if name.startswith(SCORES) else dtype)
    right = function(*halves)
    assert torch.equal(out, right)
    out.sum().backward()
    right.sum().backward()
    for leaf, half in zip(leaves, halves, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, half.grad.float())


@functions
def test_autocast_leaves_double_alone(backend, name):
    function, inputs = FUNCTIONS[name]
    leaves = tensors(*inputs, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = function(*leaves)
    assert out.dtype == torch.float64
    assert torch.equal(out, function(*leaves))


@functions
def test_no_grad_and_inference_mode(backend, name):
    function, inputs = FUNCTIONS[name]
    leaves = tensors(*inputs)
    right = function(*leaves).detach()
    with torch.no_grad():
        out = function(*leaves)
        assert not out.requires_grad
        assert torch.equal(out, right)
    with torch.inference_mode():
        assert torch.equal(function(*leaves), right)


def batched(name: str) -> tuple[Callable, tuple[torch.Tensor, ...]]:
    """A sample as a function of all its tensors, and a batch of two, of other masks and lengths too."""
    sample = SAMPLES[name]
    pairs = zip(sample.make(SMALL, seed=0), sample.make(SMALL, seed=len(sample.names)), strict=True)
    return lambda *made: sample.run(SMALL, made), tuple(map(torch.stack, pairs))


@first_and_last
@pytest.mark.parametrize("name", COUNTED)
def test_vmap_is_the_loop(named, name):
    function, args = batched(name)
    with running(named):
        each = [function(*(arg[i] for arg in args)) for i in range(2)]
        together = torch.vmap(function)(*args)
        moved = torch.vmap(function, in_dims=-1)(*(arg.movedim(0, -1) for arg in args))
        shared = torch.vmap(function, in_dims=(0, *(None,) * (len(args) - 1)))(
            args[0], *(arg[0] for arg in args[1:])
        )
    right = tuple(map(torch.stack, zip(*each, strict=True)))
    torch.testing.assert_close(together, right)
    torch.testing.assert_close(moved, right)
    torch.testing.assert_close(tuple(out[0] for out in shared), each[0])


@first_and_last
@pytest.mark.parametrize(
    ("name", "its"),
    [pair for pair in product(SAMPLES, ("indices", "latents")) if pair[1] in SAMPLES[pair[0]].names],
)
@pytest.mark.parametrize("bad", [-1, M, -M - 1, 2**40])
def test_indices_are_checked_under_transforms(named, name, its, bad):
    function, args = batched(name)
    place = (2, 1) if its == "indices" else (7,)
    args[SAMPLES[name].names.index(its)][(1, *place)] = bad
    told = rf"{', '.join(map(str, place))}\] must be in \[0, {M}\), got {bad}"
    with running(named):
        for call in (torch.vmap(function), torch.vmap(torch.func.functionalize(function))):
            with pytest.raises(IndexError, match=told):
                call(*args)


@first_and_last
def test_what_data_must_be_is_checked_under_vmap(named):
    x, weight = random(2, N, D, seed=1), random(2, M, D, seed=2)
    mask, spans = torch.arange(M) < torch.tensor([[9], [3]]), torch.tensor([[0, 1, T], [0, T + 1, T]])
    a, bounds = random(2, 1, T, D, seed=3), torch.ones(2, M)
    bounds[1, 2] = torch.nan
    with running(named):
        with pytest.raises(ValueError, match=r"eligible latents \(3\), got k=5"):
            torch.vmap(lambda x, w, mask: fastsparse.topk_encode(x, w, k=5, latent_mask=mask))(
                x, weight, mask
            )
        with pytest.raises(ValueError, match="dictionary must have atoms of norm 1"):
            torch.vmap(lambda x, w: fastsparse.matching_pursuit(x, w, k=1, normalized=True))(x, weight)
        with pytest.raises(ValueError, match=rf"must not decrease, got {T} after {T + 1} at 2"):
            torch.vmap(lambda a, spans: fastsparse.linear_recurrence(a, a, cu_seqlens=spans))(a, spans)
        with pytest.raises(ValueError, match=r"total must be .* eligible latents .*, got total=27"):
            torch.vmap(
                lambda x, w, mask: fastsparse.batch_topk_encode(x, w, total=27, latent_mask=mask).code
            )(x, weight, mask)
        with pytest.raises(ValueError, match=r"threshold must not be NaN, got it at \[.*2\]"):
            torch.vmap(lambda x, w, t: fastsparse.threshold_encode(x, w, threshold=t, max_entries=N * M))(
                x, weight, bounds
            )
        function, args = batched("spmm, ragged")
        args[-1][1, 2] = 2 * N * k
        with pytest.raises(ValueError, match=r"spmm: offsets must not decrease, got .* after 30 at 3"):
            torch.vmap(function)(*args)


@first_and_last
def test_vmap_must_know_how_much_comes_out(named):
    function, args = batched("threshold_encode, abs, masked")
    with (
        running(named),
        pytest.raises(ValueError, match="threshold_encode: max_entries must be given under vmap"),
    ):
        torch.vmap(function)(*args)


@pytest.mark.parametrize(
    ("named", "name"),
    [
        pair
        for pair in product(FIRST_AND_LAST, COUNTED)
        if pair[0] != "reference" or "shooting" not in pair[1]  # which takes ten seconds there
    ],
)
def test_nothing_is_read_of_tensors_without_data(named, name):
    function, args = batched(name)
    args = tuple(arg[0] for arg in args)
    with running(named):
        right = function(*args)
        with FakeTensorMode() as mode:
            inside = function(*map(mode.from_tensor, args))
    for out, fake in zip(right, inside, strict=True):
        assert fake.shape == out.shape
        assert fake.dtype == out.dtype


def directions(primals):
    return tuple(random(*primal.shape, seed=7 + i, dtype=primal.dtype) for i, primal in enumerate(primals))


def jvp(function, primals, tangents):
    return torch.func.jvp(function, primals, tangents)[1]


def dual_jvp(function, primals, tangents):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(*map(forward_ad.make_dual, primals, tangents))).tangent


def in_compiled_code(differentiate):
    def compiled(function, primals, tangents):
        return torch.compile(partial(differentiate, function), fullgraph=True, backend="aot_eager")(
            primals, tangents
        )

    return compiled


# Ways to a tangent that hide from an op what it is in.
FORWARD = {
    "func": jvp,
    "dual": dual_jvp,
    "linearized": lambda function, primals, tangents: torch.func.linearize(function, *primals)[1](*tangents),
    "no_grad": lambda function, *pair: jvp(torch.no_grad()(function), *pair),
    "inside_compiled": in_compiled_code(jvp),
    "of_compiled": lambda function, *pair: jvp(torch.compile(function, backend="aot_eager"), *pair),
    "batched": lambda function, primals, tangents: torch.vmap(partial(jvp, function, primals))(
        tuple(torch.stack((tangent, tangent)) for tangent in tangents)
    )[1],
}


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("name", "way"),
    [*product(CORE, ("func", "inside_compiled")), *product(("topk_encode",), FORWARD)],
)
def test_forward_mode(name, way):
    function, inputs = FUNCTIONS[name]
    primals = tuple(leaf.detach() for leaf in tensors(*inputs, dtype=torch.float64))
    tangents = directions(primals)
    with fastsparse.use_backend("reference"):
        right = jvp(function, primals, tangents)
    torch.testing.assert_close(FORWARD[way](function, primals, tangents), right)


@functions
def test_forward_mode_of_what_has_no_tangent(name):
    function, inputs = FUNCTIONS[name]
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(function(*tensors(*inputs))).tangent is None


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("name", "compiler"),
    [*product(CORE, ("eager",)), ("topk_encode", "aot_eager"), ("topk_encode", "inductor")],
)
def test_dual_tensors_never_lose_their_tangents_in_a_graph(name, compiler):
    function, inputs = FUNCTIONS[name]
    primals = tuple(leaf.detach() for leaf in tensors(*inputs, dtype=torch.float64))
    tangents = directions(primals)
    refusal = "dual tensors can't go into a compiled or exported graph"

    def doubled(*args):
        return function(*(2 * arg for arg in args))

    def refused_or_right(run, of):  # where PyTorch has given up on compiling, it runs the function itself
        try:
            found = run()
        except NotImplementedError as error:
            if refusal not in str(error):
                raise
        else:
            torch.testing.assert_close(found, dual_jvp(of, primals, tangents))

    compiled = torch.compile(doubled, backend=compiler)
    compiled(*primals)
    with pytest.raises(NotImplementedError, match=refusal):
        dual_jvp(compiled, primals, tangents)
    torch.compiler.reset()
    refused_or_right(lambda: dual_jvp(compiled, primals, tangents), doubled)
    inside = torch.compile(partial(dual_jvp, function), backend=compiler)  # nor be made inside of one
    refused_or_right(lambda: inside(primals, tangents), function)


@functions
@pytest.mark.usefixtures("_fresh_compiler")
def test_functional_gradients(name):
    function, inputs = FUNCTIONS[name]
    leaves = tensors(*inputs, dtype=torch.float64)
    primals, every = tuple(leaf.detach() for leaf in leaves), tuple(range(len(leaves)))
    right = torch.autograd.grad(function(*leaves).square().sum(), leaves)

    def loss(*args):
        return function(*args).square().sum()

    gradient = torch.func.grad(loss, argnums=every)
    torch.testing.assert_close(gradient(*primals), right)
    jacobians = (
        torch.func.jacrev(function, argnums=every)(*primals),
        torch.func.jacfwd(function, argnums=every)(*primals),
    )
    torch.testing.assert_close(*jacobians)
    tangents = directions(primals)

    def dual_over_backward():
        with forward_ad.dual_level():
            pairs = zip(primals, tangents, strict=True)
            duals = [
                forward_ad.make_dual(primal.clone().requires_grad_(), tangent) for primal, tangent in pairs
            ]
            grads = torch.autograd.grad(loss(*duals), duals)
            return tuple(forward_ad.unpack_dual(grad).tangent for grad in grads)

    def of_forward():
        return torch.func.grad(lambda *args: jvp(loss, args, tangents), argnums=every)(*primals)

    for second in (
        lambda: jvp(gradient, primals, tangents),
        lambda: torch.func.vjp(gradient, *primals)[1](tangents),
        dual_over_backward,
        of_forward,
    ):
        with fastsparse.use_backend("reference"):
            right = second()
        if name.startswith(ONCE) and second is not of_forward:
            with pytest.raises(NotImplementedError, match="second derivatives must be taken inside"):
                second()
        else:
            torch.testing.assert_close(second(), right)


def test_functional_gradients_may_pass_an_op_by():
    values, weight = (leaf.detach() for leaf in tensors("values", "weight"))
    found = torch.func.grad(lambda factor: (factor * fastsparse.spmm(values, CODE, weight)).sum())(
        torch.ones(())
    )
    torch.testing.assert_close(found, fastsparse.spmm(values, CODE, weight).sum())


def test_functional_gradients_may_pass_by_what_wants_none():
    """Tensors that are made inside are tracked as well, and want no gradient."""
    values = random(N, k, seed=1)

    def function(factor):
        return (factor * fastsparse.spmm(values, CODE, torch.ones(M, D))).sum()

    found = torch.func.grad(function)(torch.ones(()))
    torch.testing.assert_close(found, function(torch.ones(())))
