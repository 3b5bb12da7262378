"""Bad input to every public function: the error names the argument, what it was and what it should be."""

import inspect
import re

import numpy as np
import pytest
import torch

import fastsparse

N, k, M, D = 3, 2, 7, 5
FLOATS = {
    "topk_encode": {"x": (N, D), "weight": (M, D), "bias": (M,), "latent_scale": (M,)},
    "batch_topk_encode": {"x": (N, D), "weight": (M, D), "bias": (M,), "latent_scale": (M,)},
    "threshold_encode": {"x": (N, D), "weight": (M, D), "bias": (M,)},
    "sparse_decode": {"values": (N, k), "weight": (M, D), "bias": (D,)},
    "spmm": {"values": (N, k), "weight": (M, D)},
    "sddmm": {"x": (N, D), "weight": (M, D)},
    "spmm_t": {"values": (N, k), "x": (N, D)},
    "matching_pursuit": {"x": (N, D), "dictionary": (M, D)},
    "matching_pursuit_step": {"residual": (N, D), "dictionary": (M, D)},
    "linear_recurrence": {"b": (N, k, D), "a": (N, k, D), "h0": (N, D)},
    "gru_recurrence": {"u": (N, k, 3, D), "weight": (3, D), "h0": (N, D)},
    "lstm_recurrence": {"u": (N, k, 3, D), "weight": (3, D), "peephole": (2, D)},
}
OTHERS = {
    "k": k,
    "total": N * k,
    "num_latents": M,
    "indices": torch.ones(N, k, dtype=torch.int64),
    "latent_mask": torch.ones(M, dtype=torch.bool),
}
every_float = pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, names in FLOATS.items() for name in names]
)
every_code = pytest.mark.parametrize("op", ["sparse_decode", "spmm", "sddmm", "spmm_t"])


def call(op: str, **replaced):
    """The op on good arguments, but for those replaced."""
    run = getattr(fastsparse, op)
    good = {name: OTHERS[name] for name in inspect.signature(run).parameters if name in OTHERS}
    good |= {name: torch.ones(shape) for name, shape in FLOATS[op].items()}
    assert replaced.keys() <= good.keys()
    return run(**(good | replaced))


def refused(error: type[Exception], op: str, *parts: str, **replaced) -> None:
    """The call raises exactly this error, and the message starts with the op and holds every part."""
    with pytest.raises(error) as caught:
        call(op, **replaced)
    assert type(caught.value) is error
    message = str(caught.value)
    assert message.startswith(f"{op}: ")
    for part in parts:
        assert re.search(rf"(?<!\w){re.escape(part)}(?!\w)", message), f"{part!r} is not in {message!r}"


@pytest.mark.parametrize("op", FLOATS)
def test_the_good_arguments_are_good(backend, op):
    call(op)


@every_float
@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_dtype(op, name, dtype):
    bad = torch.ones(FLOATS[op][name]).to(dtype)
    refused(TypeError, op, name, "float32", "bfloat16", "float16", "float64", str(dtype)[6:], **{name: bad})


@every_float
def test_not_a_tensor(op, name):
    refused(TypeError, op, name, "torch.Tensor", "ndarray", **{name: np.ones(FLOATS[op][name], np.float32)})
    refused(TypeError, op, name, "torch.Tensor", "list", **{name: [1.0]})


@pytest.mark.filterwarnings("ignore:.*(quantiz|Sparse).*")
@every_float
def test_layout_and_place(op, name):
    dense = torch.ones(FLOATS[op][name])
    refused(TypeError, op, name, "dense", "torch.sparse_coo", **{name: dense.to_sparse()})
    refused(TypeError, op, name, "meta", **{name: dense.to("meta")})
    quantised = torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8)
    refused(TypeError, op, name, "quantised", "torch.qint8", **{name: quantised})


@every_float
def test_mixed_dtypes(op, name):
    first = next(iter(FLOATS[op]))
    bad = torch.ones(FLOATS[op][name], dtype=torch.float64)
    if name == first:
        other = list(FLOATS[op])[1]
        refused(ValueError, op, other, first, "float64", "float32", **{name: bad})
    else:
        refused(ValueError, op, name, first, "float32", "float64", **{name: bad})


# Of each op and argument the shapes that can't be, and which argument then is named.
BAD_SHAPES = [
    ("topk_encode", "x", [(), (N, D + 1), (0,)], "x"),
    ("topk_encode", "weight", [(), (D,), (2, M, D)], "weight"),
    ("topk_encode", "weight", [(M, D + 1)], "x"),
    ("topk_encode", "bias", [(), (M + 1,), (1, M), (0,)], "bias"),
    ("topk_encode", "latent_scale", [(), (M + 1,), (1, M), (0,)], "latent_scale"),
    ("sparse_decode", "values", [(), (N, k + 1), (N + 1, k), (2, N, k)], "values"),
    ("sparse_decode", "weight", [(), (D,), (2, M, D)], "weight"),
    ("sparse_decode", "bias", [(), (D + 1,), (1, D), (M,)], "bias"),
    ("sparse_decode", "weight", [(M, D + 1)], "bias"),
    ("spmm", "values", [(), (N, k + 1), (N + 1, k), (2, N, k)], "values"),
    ("spmm", "weight", [(), (D,), (2, M, D)], "weight"),
    ("sddmm", "x", [(), (N, D + 1), (N + 1, D), (2, N, D)], "x"),
    ("sddmm", "weight", [(), (D,), (2, M, D)], "weight"),
    ("sddmm", "weight", [(M, D + 1)], "x"),
    ("spmm_t", "values", [(), (N, k + 1), (N + 1, k), (2, N, k)], "values"),
    ("spmm_t", "x", [(), (N + 1, D), (2, N, D), (D,)], "x"),
    ("matching_pursuit", "x", [(), (N, D + 1), (0,)], "x"),
    ("matching_pursuit", "dictionary", [(), (D,), (2, M, D), (0, D)], "dictionary"),
    ("matching_pursuit", "dictionary", [(M, D + 1)], "x"),
    ("matching_pursuit_step", "residual", [(), (N, D + 1), (0,)], "residual"),
    ("matching_pursuit_step", "dictionary", [(), (D,), (2, M, D), (0, D)], "dictionary"),
]


@pytest.mark.parametrize(
    ("op", "name", "shape", "named"),
    [(op, name, shape, named) for op, name, shapes, named in BAD_SHAPES for shape in shapes],
)
def test_shape(op, name, shape, named):
    got = str(shape) if named == name else str(FLOATS[op][named])
    with pytest.raises(ValueError, match=rf"^{op}: .*{named}.*{re.escape(got)}"):
        call(op, **{name: torch.ones(shape)})


def test_messages_in_full():
    cases = [
        ("topk_encode: x must have shape (..., D) with D = 5, got shape (3, 6)", {"x": torch.ones(3, 6)}),
        ("topk_encode: weight must have shape (M, D), got shape (7,)", {"weight": torch.ones(7)}),
        ("topk_encode: bias must have shape (M,) = (7,), got shape (6,)", {"bias": torch.ones(6)}),
        (
            "topk_encode: latent_mask must have shape (M,) = (7,), got shape (8,)",
            {"latent_mask": torch.ones(8) > 0},
        ),
    ]
    for message, replaced in cases:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call("topk_encode", **replaced)


@pytest.mark.parametrize("bad", [0, -1, M + 1, 2**40])
def test_k_out_of_range(backend, bad):
    refused(ValueError, "topk_encode", "between 1 and the number of eligible latents (7)", f"k={bad}", k=bad)


@pytest.mark.parametrize(
    ("bad", "type_name"), [(2.0, "float"), ("2", "str"), (None, "NoneType"), (True, "bool")]
)
def test_k_of_another_type(bad, type_name):
    refused(TypeError, "topk_encode", "k", "int", type_name, k=bad)


@pytest.mark.parametrize("eligible", [0, 1])
def test_more_than_the_eligible(backend, eligible):
    mask = torch.arange(M) < eligible
    for tokens in (N, 0):
        x = torch.ones(tokens, D)
        refused(ValueError, "topk_encode", f"eligible latents ({eligible})", "k=2", x=x, latent_mask=mask)


def test_mask():
    for dtype in (torch.uint8, torch.int64, torch.float32):
        mask = torch.ones(M, dtype=dtype)
        refused(TypeError, "topk_encode", "latent_mask", "bool", str(dtype)[6:], latent_mask=mask)
    refused(ValueError, "topk_encode", "latent_mask", "(7,)", "(1, 7)", latent_mask=torch.ones(1, M) > 0)
    refused(TypeError, "topk_encode", "latent_mask", "torch.Tensor", "list", latent_mask=[True] * M)
    refused(TypeError, "topk_encode", "latent_mask", "meta", latent_mask=torch.ones(M, device="meta") > 0)


@pytest.mark.parametrize("activation", ["gelu", "", "ReLU", None, 1])
def test_activation(activation):
    with pytest.raises(ValueError, match="activation must be one of relu, none, abs, got") as caught:
        fastsparse.topk_encode(torch.ones(N, D), torch.ones(M, D), k=k, activation=activation)
    assert repr(activation) in str(caught.value)


@every_code
def test_indices(op):
    assert torch.equal(call(op, indices=torch.ones(N, k, dtype=torch.int32)), call(op))
    for dtype in (torch.int16, torch.float32, torch.bool):
        refused(TypeError, op, "indices", "int64", str(dtype)[6:], indices=torch.ones(N, k, dtype=dtype))
    refused(TypeError, op, "indices", "torch.Tensor", "list", indices=[[0]])
    refused(ValueError, op, "indices", indices=torch.tensor(0))
    shape = torch.ones(N + 1, k, dtype=torch.int64)
    refused(ValueError, op, "indices", "(4, 2)" if op != "sddmm" else "(3, 5)", indices=shape)
    refused(TypeError, op, "indices", "meta", indices=torch.ones(N, k, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize(
    ("bad", "error"), [(-1, ValueError), (2.0, TypeError), (True, TypeError), (None, TypeError)]
)
def test_num_latents(bad, error):
    refused(error, "spmm_t", "num_latents", str(bad), num_latents=bad)


@pytest.mark.parametrize("whole", [np.int64(2), np.int32(2), torch.tensor(2), torch.tensor([2])], ids=repr)
def test_whole_numbers_are_what_pytorch_takes_for_them(whole):
    for op, name in (("topk_encode", "k"), ("matching_pursuit", "k"), ("spmm_t", "num_latents")):
        out = call(op, **{name: whole})
        right = call(op, **{name: 2})
        for mine, theirs in zip(out, right, strict=True):
            assert torch.equal(mine, theirs)
    for bad in (np.float64(2), np.bool_(True), torch.tensor(True), torch.tensor(2.0), torch.tensor([2, 2])):
        refused(TypeError, "topk_encode", "k", "int", k=bad)


def test_no_latents(backend):
    weight, empty = torch.ones(0, D), torch.ones(0, k)
    indices = torch.ones(0, k, dtype=torch.int64)
    assert fastsparse.spmm(empty, indices, weight).shape == (0, D)
    assert fastsparse.sddmm(torch.ones(0, D), weight, indices).shape == (0, k)
    assert fastsparse.spmm_t(empty, indices, torch.ones(0, D), 0).shape == (0, D)
    one, index = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    for op, arguments in (
        (fastsparse.spmm, (one, index, weight)),
        (fastsparse.sddmm, (torch.ones(1, D), weight, index)),
        (fastsparse.spmm_t, (one, index, torch.ones(1, D), 0)),
    ):
        with pytest.raises(IndexError, match=r"indices\[0, 0\] must be in \[0, 0\), got 0"):
            op(*arguments)
    with pytest.raises(ValueError, match=r"eligible latents \(0\), got k=1"):
        fastsparse.topk_encode(torch.ones(1, D), weight, k=1)


def test_an_error_leaves_nothing_behind(backend):
    # The next call after a refused one is served as if nothing had been.
    x = torch.ones(N, D)
    with pytest.raises(IndexError):
        fastsparse.spmm(torch.ones(N, k), torch.full((N, k), M), torch.ones(M, D))
    assert torch.equal(
        fastsparse.spmm(torch.ones(N, k), torch.ones(N, k, dtype=torch.int64), torch.ones(M, D)), k * x
    )
