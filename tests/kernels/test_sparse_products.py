"""What the sparse products in Triton promise beyond the op tests: the same bits however they are laid out."""

from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import integers
from test_sparse_products import every_product
from test_sparse_products_gpu import arguments

pytest.importorskip("triton")

from fastsparse.kernels import _launch, _list_sums, spmm, spmm_t

from fastsparse import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _on_cpu_by_interpreter():
    if DEVICE == "cpu" and not _launch.INTERPRETED:
        pytest.skip("Triton compiles for the GPU here: TRITON_INTERPRET=1 would choose its interpreter")
    with np.errstate(all="ignore"):
        yield


@every_product
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("N", "k", "M", "D"), [(9, 21, 30, 1025), (70, 9, 3, 256), (300, 3, 2, 1)])
def test_every_configuration_gives_the_same_bits(monkeypatch, product, dtype, N, k, M, D):
    made = product.make(N, k, M, D, dtype, distinct=False)
    assert_same_in_every_configuration(monkeypatch, product.name, [*made, None])


@every_product
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("counts", "D"), [([0, 7, 520, 1], 1025), ([1, 300] * 9, 16), ([2] * 300, 1)])
def test_every_configuration_gives_the_same_bits_of_ragged_codes(monkeypatch, product, dtype, counts, D):
    *made, offsets = arguments(product.name, counts, 9, 30, D, dtype)
    noise = [value * 0.7 if is_float(value) else value for value in made]
    assert_same_in_every_configuration(monkeypatch, product.name, [*noise, offsets])


def is_float(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def assert_same_in_every_configuration(monkeypatch, name, made):
    module, outs = import_module(f"fastsparse.kernels.{name}"), []
    made = [value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in made]
    for configuration in module.CONFIGURATIONS:
        monkeypatch.setattr(module, "CONFIGURATIONS", (configuration,))
        monkeypatch.setattr(_launch, "_chosen", {})
        outs.append(getattr(module, name)(*made))
    assert all(torch.equal(out, outs[0]) for out in outs)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=7),
    split=st.sampled_from([1, 2, 4, 8]),
    k=st.integers(1, 3),
    D=st.sampled_from([1, 17]),
    seed=st.integers(0, 2**31),
)
def test_hot_latents_are_joined_from_their_pieces(lengths, split, k, D, seed):
    # Lists of any length, beginning and ending anywhere in the tiles.
    entries = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    entries = entries[torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed))]
    N = len(entries) // k
    indices = entries[: N * k].view(N, k)
    values, x = integers(N, k, seed=seed), integers(N, D, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_list_sums, "SPLIT", split)
        given = (tensor.to(DEVICE) for tensor in (values, indices, x))
        out = spmm_t.spmm_t(*given, len(lengths), None).cpu()
    assert torch.equal(out, reference.spmm_t(values, indices, x, len(lengths)))


@every_product
@given(
    lengths=st.lists(st.integers(0, 40), max_size=7),
    padding=st.integers(0, 20),
    split=st.sampled_from([1, 2, 4, 8]),
    D=st.sampled_from([1, 17]),
)
def test_ragged_codes_are_joined_from_their_pieces(product, lengths, padding, split, D):
    made = arguments(product.name, lengths, padding, 4, D)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_list_sums, "SPLIT", split)
        module = import_module(f"fastsparse.kernels.{product.name}")
        given = (value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in made)
        out = getattr(module, product.name)(*given).cpu()
    assert torch.equal(out, getattr(reference, product.name)(*made))


@every_product
@pytest.mark.parametrize("D", [1, 4])
def test_offsets_that_nobody_checked_lead_nowhere_outside(monkeypatch, product, D):
    monkeypatch.setattr(_list_sums, "SPLIT", 8)
    *made, right = arguments(product.name, [3, 0, 97], 0, 5, D)
    made = [value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in made]
    op = getattr(import_module(f"fastsparse.kernels.{product.name}"), product.name)

    def run(*offsets: int) -> torch.Tensor:
        return op(*made, torch.tensor(offsets, device=DEVICE))

    assert torch.equal(run(-(2**40), 3, 3, 2**40), run(*right.tolist()))
    run(90, 20, -1, 300)


def test_more_entries_than_are_counted_is_an_error():
    indices = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE).expand(2**20, 2**11)
    values, x = torch.zeros(1, 1, device=DEVICE).expand(2**20, 2**11), torch.zeros(1, 1, device=DEVICE)
    with pytest.raises(
        ValueError, match=f"^spmm_t: the code must have at most {2**30} entries and latents, got"
    ):
        spmm_t.spmm_t(values, indices, x.expand(2**20, 1), 1, None)
    one, x = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.zeros(1, 1, device=DEVICE)
    with pytest.raises(
        ValueError, match=f"^spmm: the code must have at most {2**30} entries and tokens, got"
    ):
        spmm.spmm(x[0].expand(2**31), one.expand(2**31), x, one.expand(2))


@pytest.fixture
def clock(monkeypatch):
    """A machine on which a configuration takes as long as its number says, and which logs what is timed."""
    timed = []
    for known in ("_chosen", "timed"):
        monkeypatch.setattr(_launch, known, {})
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_launch, "_time", lambda launch, candidate: timed.append(candidate) or candidate)
    return timed


def test_the_fastest_configuration_is_chosen_once_for_each_key(clock):
    ran = []
    for key in ("a", "a", "b"):
        _launch.tuned(key, (3, 1, 2), ran.append)
    assert ran == [1, 1, 1]
    assert clock == [3, 1, 2, 3, 1, 2]


def test_nothing_is_timed_while_a_graph_is_captured(clock, monkeypatch):
    ran = []
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        _launch.tuned("a", (3, 1, 2), ran.append)
    assert not clock
    _launch.tuned("a", (3, 1, 2), ran.append)
    assert ran == [3, 1]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    _launch.tuned("a", (3, 1, 2), ran.append)
    assert ran == [3, 1, 1]
