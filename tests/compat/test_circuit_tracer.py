"""circuit-tracer with our ops beneath it and without: the same activations, reconstructions, gradients."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from importlib import metadata

import alike
import pytest
import torch
import torch.nn.functional as F
from alike import EXACT, SINGLE, assert_alike, attributes, gradients
from torch import Tensor, nn

try:
    metadata.version("circuit-tracer")
except metadata.PackageNotFoundError:
    pytest.skip("circuit-tracer is not installed: make peers-test", allow_module_level=True)

from circuit_tracer.transcoder import SingleLayerTranscoder, TranscoderSet
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt
from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder

from fastsparse.codes import code_of
from fastsparse.compat import circuit_tracer as adapter

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")
unpatched = alike.unpatched(adapter)
with_and_without, refusals = partial(alike.with_and_without, adapter), partial(alike.refusals, adapter)
served, assert_refused = partial(alike.served, adapter), partial(alike.assert_refused, adapter)
N, D, M, L, K = 24, 16, 96, 3, 4
CPU = torch.device("cpu")
ENCODE, DECODE = "SingleLayerTranscoder.encode", "SingleLayerTranscoder.decode"
SPARSE, FROM_SPARSE = "SingleLayerTranscoder.encode_sparse", "SingleLayerTranscoder.decode_sparse"
CROSS_SPARSE, CROSS_LAYER = "CrossLayerTranscoder.encode_sparse", "CrossLayerTranscoder.encode_layer"
CROSS_DECODE, RECONSTRUCT = "CrossLayerTranscoder.decode", "CrossLayerTranscoder.compute_reconstruction"


def jump_relu() -> JumpReLU:
    return JumpReLU(1.6 + 0.4 * torch.rand(M, dtype=torch.float64), bandwidth=0.2)


FUNCTIONS = {"relu": lambda: F.relu, "module": nn.ReLU, "jump": jump_relu, "topk": lambda: TopK(K)}
every_function = pytest.mark.parametrize("function", FUNCTIONS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
POSITIONS = [slice(0, 1), slice(0, 0), slice(3, None, 2), slice(-4, -1)]


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (N, D)), generator=generator, dtype=torch.float64).to(dtype)


def scrambled(module: nn.Module, dtype: torch.dtype, sparse: bool) -> nn.Module:
    """Weights of a transcoder of which few latents are active."""
    for name, parameter in module.named_parameters():
        if "threshold" not in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64) / D**0.5
    module.b_enc.data = module.b_enc.data / 4 - (1.7 if sparse else 0)
    return module.to(dtype)


def single(function: str = "relu", dtype: torch.dtype = torch.float64, **options) -> SingleLayerTranscoder:
    torch.manual_seed(1)
    made = SingleLayerTranscoder(D, M, FUNCTIONS[function](), 0, device=CPU, dtype=torch.float64, **options)
    return scrambled(made, dtype, function in ("relu", "module"))


def cross(function: str = "relu", dtype: torch.dtype = torch.float64, **options) -> CrossLayerTranscoder:
    torch.manual_seed(2)
    kind = {"jump": "jump_relu"}.get(function, "relu")
    options = {"lazy_decoder": False} | options
    made = CrossLayerTranscoder(L, M, D, kind, device=CPU, dtype=torch.float64, **options)
    if function == "jump":
        made.activation_function.threshold.data = 1.6 + 0.4 * torch.rand(L, 1, M, dtype=torch.float64)
    elif function != "relu":
        made.activation_function = FUNCTIONS[function]()
    return scrambled(made, dtype, function in ("relu", "module"))


def within(dtype: torch.dtype) -> float:
    return EXACT if dtype == torch.float64 else SINGLE


def parts(sparse: Tensor) -> dict:
    """All that can be seen of a tensor of layout COO."""
    assert sparse.layout is torch.sparse_coo
    return {
        "indices": sparse.indices(), "values": sparse.values(), "coalesced": sparse.is_coalesced(),
        "shape": tuple(sparse.shape), "dtype": str(sparse.dtype), "dims": sparse.sparse_dim(),
        "requires_grad": sparse.requires_grad, "ids": str(sparse.indices().dtype),
    }  # fmt: skip


# Transcoders of one layer.


@every_function
@every_dtype
@pytest.mark.parametrize("zero", POSITIONS, ids=str)
def test_encode_sparse(function, dtype, zero):
    def run():
        with torch.no_grad():
            acts, encoders = single(function, dtype).encode_sparse(tokens(dtype=dtype), zero)
        return parts(acts), encoders

    without, ours = with_and_without(run)
    assert_alike(ours, without, within(dtype))
    assert without[0]["indices"].shape[1] > N
    assert served(SPARSE) == 1


@pytest.mark.parametrize("function", ["jump", "topk"])
@every_dtype
@pytest.mark.parametrize("zero", POSITIONS[:2], ids=str)
@pytest.mark.parametrize("through", ["values", "dense"])
def test_gradients_of_encode_sparse(function, dtype, zero, through):
    def run():
        made, x = single(function, dtype), tokens(dtype=dtype).requires_grad_()
        acts, encoders = made.encode_sparse(x, zero)
        loss = (acts.values() if through == "values" else acts.to_dense()).pow(3).sum()
        (loss + (encoders * acts.values()[:, None]).square().sum()).backward()
        return parts(acts), encoders, x.grad, gradients(made)

    without, ours = with_and_without(run)
    assert_alike(ours, without, within(dtype))
    assert without[3]["W_enc"].any()
    assert function != "jump" or without[3]["activation_function.threshold"].any()


def test_gradients_by_relu_where_the_library_raises():
    made, x = single(), tokens().requires_grad_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.encode_sparse(x)[0].values().sum().backward()
    of = [x, made.W_enc, made.b_enc]
    acts = F.relu(F.linear(x, made.W_enc, made.b_enc)) * (torch.arange(N) > 0)[:, None]
    right = torch.autograd.grad(acts.pow(3).sum(), of)
    with adapter.apply(least_work=0, on_refuse="raise"):
        acts, _ = made.encode_sparse(x)
        assert_alike(torch.autograd.grad(acts.values().pow(3).sum(), of), right)


def test_zeros_are_not_stored():
    """Above a threshold below 0 a score may be 0."""

    def run():
        made, x = single("jump"), tokens()
        with torch.no_grad():
            made.b_enc[:5] = 0
            made.activation_function.threshold[:5] = -0.5
            x[3:9] = 0
            return parts(made.encode_sparse(x)[0])

    without, ours = with_and_without(run)
    assert_alike(ours, without)
    assert (without["values"] < 0).any()
    assert not (without["indices"][0] == 5).any()


@every_function
def test_nothing_is_active(function):
    def run():
        made, x = single(function), tokens()
        with torch.no_grad():
            if function == "topk":
                x.zero_()
                made.b_enc.zero_()
            else:
                made.b_enc -= 100
            acts, encoders = made.encode_sparse(x)
            return parts(acts), encoders, made.decode_sparse(acts, x)

    without, ours = with_and_without(run)
    assert_alike(ours[1:], without[1:])
    assert ours[0]["shape"] == without[0]["shape"]
    assert ours[0]["indices"].shape == without[0]["indices"].shape == (2, 0)


@pytest.mark.parametrize("function", ["relu", "jump"])
def test_nan_surfaces(function):
    def run():
        x = tokens()
        x[5] = torch.nan
        with torch.no_grad():
            acts, _ = single(function).encode_sparse(x)
        return parts(acts)

    without, ours = with_and_without(run)
    torch.testing.assert_close(ours.pop("values"), without["values"], equal_nan=True)
    assert without.pop("values").isnan().sum() == M
    assert_alike(ours, without)


@every_function
@every_dtype
@pytest.mark.parametrize("shape", [(N, D), (2, 3, D)], ids=str)
@pytest.mark.parametrize("skip", [False, True])
def test_forward(function, dtype, shape, skip):
    def run():
        made = single(function, dtype, skip_connection=skip)
        x = tokens(*shape, dtype=dtype).requires_grad_()
        acts = made.encode(x)
        out = made.decode(acts, x)
        whole = made(x)
        (out.pow(3).sum() + whole.square().sum() + acts.sum()).backward()
        return acts, out, whole, x.grad, gradients(made)

    without, ours = with_and_without(run)
    assert_alike(ours, without, within(dtype))
    assert (served(ENCODE), served(DECODE)) == (2, 2)
    assert function != "jump" or without[4]["activation_function.threshold"].any()


def test_thresholds_get_gradients_from_activations_of_0():
    """Of latents that are off within the band about their thresholds."""

    def run():
        made = single("jump")
        acts = made.encode(tokens())
        (grad,) = torch.autograd.grad((acts * (acts == 0)).sum(), made.activation_function.threshold)
        return acts, grad

    without, ours = with_and_without(run)
    assert_alike(ours, without)
    assert without[1].any()


def test_activations_that_were_changed_are_decoded_as_they_are():
    def run():
        made = single()
        with torch.no_grad():
            acts = made.encode(tokens())
            acts[:, 3] = 2.0
            return made.decode(acts)

    without, ours = with_and_without(run, "fallback")
    assert_alike(ours, without)
    assert "activations: changed in place" in refusals()


@every_dtype
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_decode_sparse(tmp_path, dtype, lazy, skip):
    path = str(tmp_path / "layer_0.safetensors")
    single(dtype=dtype, skip_connection=skip).to_safetensors(path)

    def run():
        made = load_relu_transcoder(path, 0, CPU, dtype, lazy_encoder=lazy, lazy_decoder=lazy)
        x = tokens(dtype=dtype).requires_grad_()
        with torch.no_grad():
            acts, encoders = made.encode_sparse(x)
        values = acts.values().requires_grad_()
        acts = torch.sparse_coo_tensor(acts.indices(), values, acts.shape, is_coalesced=True)
        out, scaled = made.decode_sparse(acts, x)
        (out.pow(3).sum() + scaled.square().sum()).backward()
        return parts(acts), encoders, out, scaled, values.grad, x.grad, gradients(made)

    without, ours = with_and_without(run)
    assert_alike(ours, without, within(dtype))
    assert ("W_dec" in without[6]) != lazy
    assert (served(SPARSE), served(FROM_SPARSE)) == (1, 1)


@every_dtype
def test_attribution_components_of_a_set(dtype):
    def run():
        layers = {layer: single("jump", dtype, skip_connection=True) for layer in range(L)}
        made = TranscoderSet(layers, "hook_in", "hook_out")
        x = tokens(L, N, D, dtype=dtype)
        with torch.no_grad():
            found = made.compute_attribution_components(x, slice(0, 2))
            return parts(found.pop("activation_matrix")), found, made.encode(x), made.encode_layer(x[0], 1)

    without, ours = with_and_without(run)
    assert_alike(ours, without, within(dtype))
    assert (served(SPARSE), served(FROM_SPARSE), served(ENCODE)) == (L, L, L + 1)


@pytest.mark.parametrize("function", ["relu", "jump"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(function, dtype):
    """What is rounded is compared, here too; sums are rounded otherwise, so that some choices differ."""

    def run():
        made, x = single(function, dtype), tokens(200, D)
        with torch.no_grad():
            acts, encoders = made.encode_sparse(x)
            return acts, encoders, *made.decode_sparse(acts), made.encode(x)

    without, ours = with_and_without(run)
    for found, right in zip(ours, without, strict=True):
        assert found.dtype == right.dtype == dtype
    places = [set(map(tuple, acts.indices().T.tolist())) for acts, *_ in (without, ours)]
    assert len(places[0] ^ places[1]) < len(places[0]) / 20
    acts = [acts.to_dense().double() for acts, *_ in (without, ours)]
    both = (acts[0] != 0) == (acts[1] != 0)
    assert_alike(acts[1] * both, acts[0] * both, 0.02)
    same = both.all(dim=1)
    assert same.float().mean() > 0.8
    assert_alike(ours[2][same], without[2][same], 0.02)


# Cross-layer transcoders.


@every_function
@every_dtype
@pytest.mark.parametrize("zero", POSITIONS, ids=str)
def test_cross_layer_encode_sparse(function, dtype, zero):
    def run():
        with torch.no_grad():
            acts, encoders = cross(function, dtype).encode_sparse(tokens(L, N, D, dtype=dtype), zero)
        return parts(acts), encoders

    without, ours = with_and_without(run)
    assert_alike(ours, without, within(dtype))
    assert without[0]["indices"][0].unique().tolist() == list(range(L))
    assert served(CROSS_SPARSE) == 1


@pytest.mark.parametrize("function", ["jump", "topk"])
@every_dtype
def test_gradients_of_cross_layer_encode_sparse(function, dtype):
    def run():
        made, x = cross(function, dtype), tokens(L, N, D, dtype=dtype).requires_grad_()
        acts, encoders = made.encode_sparse(x)
        (acts.values().pow(3).sum() + encoders.square().sum()).backward()
        return parts(acts), encoders, x.grad, gradients(made)

    without, ours = with_and_without(run)
    assert_alike(ours, without, within(dtype))
    assert without[3]["W_enc"].any()


@every_function
@every_dtype
@pytest.mark.parametrize("shape", [(N, D), (1, N, D)], ids=str)
def test_encode_layer(function, dtype, shape):
    def run():
        made, x = cross(function, dtype), tokens(*shape, dtype=dtype).requires_grad_()
        acts = made.encode_layer(x, 1)
        acts.pow(3).sum().backward()
        return acts, x.grad, gradients(made)

    without, ours = with_and_without(run)
    assert_alike(ours, without, within(dtype))
    assert served(CROSS_LAYER) == 1


@every_dtype
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_cross_layer_decode(tmp_path, dtype, lazy, dense, skip):
    cross(dtype=dtype).to_safetensors(str(tmp_path))

    def run():
        if lazy:
            made = load_clt(str(tmp_path), device=CPU, dtype=dtype, lazy_encoder=True)
        else:
            made = cross(dtype=dtype)
        if skip:
            made.W_skip = nn.Parameter(tokens(L, D, D, seed=4, dtype=dtype))
        x = tokens(L, N, D, dtype=dtype).requires_grad_()
        with torch.no_grad():
            features, _ = made.encode_sparse(x, slice(0, 2))
        if dense:
            features = leaf = features.to_dense().requires_grad_()
        else:
            leaf = features.values().requires_grad_()
            features = torch.sparse_coo_tensor(features.indices(), leaf, features.shape, is_coalesced=True)
        out = made.decode(features, x)
        out.pow(3).sum().backward()
        return out, leaf.grad, x.grad, gradients(made)

    without, ours = with_and_without(run)
    if dense:  # a gradient where the activation is 0 is layout's
        assert without[1].layout == ours[1].layout
    assert_alike(ours, without, within(dtype))
    assert served(CROSS_DECODE) == 1


def test_cross_layer_decode_ends_at_the_last_active_position():
    def run():
        made, x = cross(), tokens(L, N, D)
        with torch.no_grad():
            return made.decode(made.encode_sparse(x, slice(N - 3, None))[0])

    without, ours = with_and_without(run)
    assert_alike(ours, without)
    assert without.shape == (L, N - 3, D)


def test_a_layer_without_active_latents():
    def run():
        made, x = cross(), tokens(L, N, D)
        made.b_enc.data[0] -= 100
        with torch.no_grad():
            features, encoders = made.encode_sparse(x)
        out = made.decode(features)
        out.square().sum().backward()
        return parts(features), encoders, out, gradients(made)

    without, ours = with_and_without(run)
    assert_alike(ours, without)
    assert without[3]["W_dec.0"] is None
    assert without[3]["W_dec.1"] is not None


@every_dtype
@pytest.mark.parametrize("skip", [False, True])
def test_cross_layer_attribution_components(dtype, skip):
    def run():
        made, x = cross("jump", dtype, skip_connection=skip), tokens(L, N, D, dtype=dtype)
        with torch.no_grad():
            found = made.compute_attribution_components(x)
        return parts(found.pop("activation_matrix")), found

    without, ours = with_and_without(run)
    assert_alike(ours, without, within(dtype))
    assert (served(CROSS_SPARSE), served(RECONSTRUCT)) == (1, 1)


def test_gradients_of_a_reconstruction():
    def run():
        made = cross()
        generator = torch.Generator().manual_seed(3)
        positions, layers = (torch.randint(n, (50,), generator=generator) for n in (N, L))
        vectors = tokens(50, D).requires_grad_()
        out = made.compute_reconstruction(positions, layers, vectors)
        out.pow(3).sum().backward()
        return out, vectors.grad, made.b_dec.grad

    assert_alike(*reversed(with_and_without(run)))


def test_cross_layer_forward():
    def run():
        made, x = cross(), tokens(L, N, D).requires_grad_()
        out = made(x)
        out.square().sum().backward()
        return out, x.grad, gradients(made)

    without, ours = with_and_without(run)
    assert_alike(ours, without)
    assert served(CROSS_DECODE) == 1


# What is refused.


def encode_sparse(made, x, **options):
    return made.encode_sparse(x, **options)


def set_function(function: Callable) -> Callable:
    return lambda made: setattr(made, "activation_function", function)


def hooked(made) -> None:
    made.activation_function = nn.ReLU()
    made.activation_function.register_forward_hook(lambda *_: None)


def dense(made) -> None:
    made.b_enc.data += 2


def nan_threshold(made) -> None:
    made.activation_function = JumpReLU(torch.full((M,), torch.nan, dtype=torch.float64))


def subclassed(made) -> None:
    made.__class__ = type("Other", (type(made),), {})


def under_autocast(made, x):
    with torch.autocast("cpu", torch.bfloat16):
        return made.encode_sparse(x.float())


def unsorted(made, x):
    acts, _ = made.encode_sparse(x)
    return made.decode_sparse(torch.sparse_coo_tensor(acts.indices(), acts.values(), acts.shape))


class Other(Tensor):
    pass


REFUSED = {
    "autocast": (lambda made: made.float(), under_autocast),
    "hooks": (hooked, encode_sparse),
    "codes are not sparse": (dense, encode_sparse),
    "a threshold is NaN": (nan_threshold, encode_sparse),
    "k > M / 4": (set_function(TopK(25)), encode_sparse),
    "k below 1, or no whole number": (set_function(TopK(0)), encode_sparse),
    "an activation function that isn't known": (set_function(torch.tanh), encode_sparse),
    "thresholds that aren't one a latent": (set_function(JumpReLU(1.7)), encode_sparse),
    "a bandwidth that isn't above 0": (
        set_function(JumpReLU(torch.full((M,), 1.7, dtype=torch.float64), 0.0)),
        encode_sparse,
    ),
    "a subclass, which may have methods of its own": (subclassed, encode_sparse),
    "a Other, no plain tensor": (lambda made: None, lambda made, x: made.encode(x.as_subclass(Other))),
    "positions that aren't a slice": (
        lambda made: None,
        lambda made, x: encode_sparse(made, x, zero_positions=torch.tensor([0, 3])),
    ),
    "pre-activations are asked for": (lambda made: None, lambda made, x: made.encode(x, False)),
    "the shape of the input": (lambda made: None, lambda made, x: made.encode(x[0])),
    "activations: not made of a code": (lambda made: None, lambda made, x: made.decode(x.repeat(1, 6))),
    "activations that aren't sparse, or of another shape": (
        lambda made: None,
        lambda made, x: made.decode_sparse(x.repeat(1, 6)),
    ),
    "activations that aren't coalesced": (lambda made: None, unsorted),
    "activations of another dtype or on another device": (
        lambda made: None,
        lambda made, x: made.decode_sparse(x.repeat(1, 6).float().to_sparse()),
    ),
    "a skip connection without its input": (
        lambda made: setattr(made, "W_skip", nn.Parameter(tokens(D, D))),
        lambda made, x: made.decode_sparse(made.encode_sparse(x)[0]),
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused(why):
    change, call = REFUSED[why]

    def outcome():
        made = single()
        change(made)
        try:
            with torch.no_grad():
                found = call(made, tokens())
        except (RuntimeError, IndexError, AssertionError, NotImplementedError) as error:
            return type(error).__name__, str(error)
        first, *rest = found if isinstance(found, tuple) else (found,)
        first = parts(first) if first.is_sparse else first.as_subclass(Tensor)
        if why == "a threshold is NaN":
            return first["shape"], first["indices"], rest
        return first, rest

    assert_refused(why, outcome)


CROSS_REFUSED = {
    "the shape of the input": lambda made, x: made.encode_sparse(x[:2]),
    "dtypes differ, or our ops don't take one": lambda made, x: made.encode_layer(x[0].float(), 0),
    "pre-activations are asked for": lambda made, x: made.encode_layer(x[0], 0, False),
    "no active latents, or another number of layers": lambda made, x: made.decode(
        torch.zeros(L, N, M).double()
    ),
    "no active latents": lambda made, x: made.compute_reconstruction(
        torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), x[0, :0]
    ),
    "codes are not sparse": lambda made, x: made.encode_sparse(x),
}


@pytest.mark.parametrize("why", CROSS_REFUSED)
def test_cross_layer_refused(why):
    def outcome():
        made = cross()
        if why == "codes are not sparse":
            made.b_enc.data += 2
        try:
            with torch.no_grad():
                found = CROSS_REFUSED[why](made, tokens(L, N, D))
        except (RuntimeError, IndexError, ValueError) as error:
            return type(error).__name__, str(error)
        return (parts(found[0]), found[1]) if isinstance(found, tuple) else (found, None)

    assert_refused(why, outcome)


def test_little_work_is_the_librarys_own():
    with adapter.apply(), torch.no_grad():
        single().encode_sparse(tokens())
        single().encode_sparse(tokens(), slice(None))
    assert refusals() == {"little work"}


def test_where_all_positions_are_0():
    def run():
        with torch.no_grad():
            acts, encoders = single().encode_sparse(tokens(), slice(None))
        return parts(acts), encoders

    without, ours = with_and_without(run, "fallback")
    assert ours[0]["indices"].shape == without[0]["indices"].shape
    assert refusals() == {"little work"}


# Applied and undone.


def test_undo_leaves_nothing():
    before = attributes("circuit_tracer")
    with adapter.apply():
        patched = attributes("circuit_tracer")
        changed = {name for name in before if patched[name] is not before[name]}
        assert len(changed) >= len(adapter.LIBRARY.sites)
        assert adapter.status().applied
    after = attributes("circuit_tracer")
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


@pytest.mark.parametrize("make", [single, cross])
def test_convert(make):
    made, other = make(), make()
    x = tokens() if make is single else tokens(L, N, D)
    adapter.LIBRARY.least_work = 0
    assert adapter.convert(made) is made
    with torch.no_grad():
        right = parts(other.encode_sparse(x)[0])
        assert not adapter.status().served
        for ours in (made, copy.deepcopy(made)):
            assert_alike(parts(ours.encode_sparse(x)[0]), right)
            assert adapter.status().served


def test_a_converted_one_can_be_pickled():
    made = adapter.convert(single())
    again = pickle.loads(pickle.dumps(made))
    with torch.no_grad():
        assert_alike(again(tokens()), made(tokens()))


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_compiled_it_is_the_librarys_own():
    made, x = single(), tokens()
    with torch.no_grad():
        right = made(x)
        with adapter.apply(least_work=0, on_refuse="raise"):
            torch._dynamo.reset()
            assert_alike(torch.compile(lambda x: made.decode(made.encode(x)), backend="eager")(x), right)
            assert not adapter.status().served


def test_activations_carry_their_code():
    with adapter.apply(least_work=0, on_refuse="raise"), torch.no_grad():
        assert code_of(single().encode(tokens())) is not None
