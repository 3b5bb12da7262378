"""Dense activations that carry their code: right whether or not they still stand for it."""

import copy
import pickle

import pytest
import torch
from oracle import integers, random

import fastsparse
from fastsparse.codes import code_of, codes_to_dense, decode_from_dense, fired, why_untagged

N, D, M, k = 9, 5, 40, 4


def topk(*leading: int, requires_grad: bool = False) -> fastsparse.TopK:
    x, weight = random(*leading, D, seed=1), random(M, D, seed=2).requires_grad_(requires_grad)
    return fastsparse.topk_encode(x, weight, k=k, activation="none")


def batch() -> fastsparse.BatchTopK:
    return fastsparse.batch_topk_encode(random(N, D, seed=1), random(M, D, seed=2), total=N * k)


CODES = {
    "topk": lambda: topk(N),
    "leading": lambda: topk(2, 3, N),
    "none leading": lambda: topk(),
    "batch": batch,
    "ragged": lambda: batch().code,
    "padded": lambda: fastsparse.threshold_encode(
        random(N, D, seed=1), random(M, D, seed=2), threshold=2.0, max_entries=N * M
    ),
}
of_every_code = pytest.mark.parametrize("code", CODES.values(), ids=CODES)


@of_every_code
def test_it_is_the_code_made_dense(code):
    code = code()
    right = (code.code if isinstance(code, fastsparse.BatchTopK) else code).to_dense(M)
    dense = codes_to_dense(code, M)
    assert type(dense) is torch.Tensor
    assert torch.equal(dense, right)
    found = code_of(dense)
    assert all(mine is given for mine, given in zip(found, code, strict=False))


@of_every_code
@pytest.mark.parametrize("biased", [False, True])
def test_decoding_and_its_gradients(code, biased):
    given = code()
    values = given.values.detach().double().requires_grad_()
    given = given._replace(values=values)
    weight, bias = random(M, D, seed=3).double().requires_grad_(), random(D, seed=4).double().requires_grad_()
    leaves = [values, weight, *([bias] if biased else [])]

    def derivatives(dense):
        out = decode_from_dense(dense, weight, bias if biased else None)
        upstream = random(*out.shape, seed=5).double()
        return out, *torch.autograd.grad(out, leaves, upstream, retain_graph=True)

    dense = codes_to_dense(given, M)
    plain = dense * 1
    assert why_untagged(dense) is None
    assert why_untagged(plain) == "not made of a code"
    for mine, right in zip(derivatives(dense), derivatives(plain), strict=True):
        torch.testing.assert_close(mine, right)


def test_entries_of_one_place_are_added():
    code = fastsparse.TopK(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1, 0, 1]]))
    assert codes_to_dense(code, 3).tolist() == [[2.0, 5.0, 0.0]]


def test_what_reads_it_gets_its_gradient():
    code = topk(N, requires_grad=True)
    values = code.values
    dense = codes_to_dense(code, M)
    upstream = random(N, M, seed=3)
    out = decode_from_dense(dense, torch.ones(M, 1)).sum() + (dense * upstream).sum()
    (grad,) = torch.autograd.grad(out, values)
    assert torch.equal(grad, 1 + upstream.gather(1, code.indices))


CHANGES = {
    "a row": lambda dense: dense.__setitem__((slice(None), 3), 7.0),
    "in place": lambda dense: dense.mul_(2),
    "through a view": lambda dense: dense.view(-1)[:5].zero_(),
    "through a detached one": lambda dense: dense.detach().zero_(),
    "by out=": lambda dense: torch.add(dense.detach(), 1, out=dense.detach()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_in_place_it_is_decoded_as_it_is(change):
    dense = codes_to_dense(topk(N), M)
    change(dense)
    assert why_untagged(dense) == "changed in place"
    assert code_of(dense) is None
    weight = random(M, D, seed=3)
    assert torch.equal(decode_from_dense(dense, weight), dense @ weight)


def test_hooks_get_the_gradient_that_flows_through_it():
    weight, seen = random(M, D, seed=3), []
    dense = codes_to_dense(topk(N, requires_grad=True), M)
    dense.register_hook(seen.append)
    assert why_untagged(dense) == "a hook wants its gradient"
    decode_from_dense(dense, weight).sum().backward()
    torch.testing.assert_close(seen[0], weight.sum(1).expand(N, M))
    dense = codes_to_dense(topk(N, requires_grad=True), M)
    dense.retain_grad()
    assert why_untagged(dense) == "it retains its gradient"
    decode_from_dense(dense, weight).sum().backward()
    torch.testing.assert_close(dense.grad, weight.sum(1).expand(N, M))


def test_gradients_that_are_wanted_after_decoding():
    weight, seen = random(M, D, seed=3).requires_grad_(), []
    x, encoder = random(N, D, seed=1), random(M, D, seed=2).requires_grad_()

    def decoded():
        code = fastsparse.topk_encode(x, encoder, k=k, activation="none")
        dense = codes_to_dense(code, M)
        return dense, decode_from_dense(dense, weight).square().sum()

    dense, loss = decoded()
    right = torch.autograd.grad(loss, [encoder, weight])
    upstream = 2 * (dense @ weight).detach() @ weight.detach().T
    dense, loss = decoded()
    torch.testing.assert_close(torch.autograd.grad(loss, dense)[0], upstream)
    for want in (lambda dense: dense.register_hook(seen.append), torch.Tensor.retain_grad):
        dense, loss = decoded()
        want(dense)
        for mine, theirs in zip(torch.autograd.grad(loss, [encoder, weight]), right, strict=True):
            torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(seen[0], upstream)
    torch.testing.assert_close(dense.grad, upstream)


def test_second_derivatives():
    weight = random(M, D, seed=3).double().requires_grad_()
    code = topk(N)
    values = code.values.double().requires_grad_()

    def second(dense):
        loss = decode_from_dense(dense, weight).pow(3).sum()
        first = torch.autograd.grad(loss, [values, weight], create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), [values, weight])

    dense = codes_to_dense(code._replace(values=values), M)
    plain = codes_to_dense(code._replace(values=values), M) * 1
    for mine, right in zip(second(dense), second(plain), strict=True):
        torch.testing.assert_close(mine, right)


def test_inside_of_transforms_it_is_an_ordinary_tensor():
    weight, code = random(M, D, seed=3), topk(N)

    def loss(values):
        return decode_from_dense(codes_to_dense(code._replace(values=values), M), weight).square().sum()

    right = torch.autograd.grad(loss(leaf := code.values.requires_grad_()), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(code.values.detach()), right)


def test_copies_are_ordinary_tensors():
    dense = codes_to_dense(topk(N), M)
    for other in (
        copy.deepcopy(dense),
        copy.copy(dense),
        pickle.loads(pickle.dumps(dense)),
        dense[:],
        dense + 0,
    ):
        assert torch.equal(other, dense)
        assert why_untagged(other) == "not made of a code"
    changed = codes_to_dense(topk(N), M).zero_()
    assert code_of(copy.deepcopy(changed)) is None
    assert code_of(dense) is not None


def test_the_code_lives_as_long_as_the_tensor():
    from fastsparse.codes.tagged import _TAGS

    before = len(_TAGS)
    dense = codes_to_dense(topk(N), M)
    assert len(_TAGS) == before + 1
    del dense
    assert len(_TAGS) == before


def test_in_inference_mode_nothing_is_remembered():
    with torch.inference_mode():
        dense = codes_to_dense(topk(N), M)
        assert code_of(dense) is None
        weight = random(M, D, seed=3)
        assert torch.equal(decode_from_dense(dense, weight), dense @ weight)
    with torch.no_grad():
        assert code_of(codes_to_dense(topk(N), M)) is not None


@of_every_code
def test_fired(code):
    code = code()
    dense = codes_to_dense(code, M)
    right = (dense > 0).reshape(-1, M).any(0)
    assert right.any()
    assert not right.all()
    for given in (code, dense, dense + 0):
        assert torch.equal(fired(given, M), right)


def test_refusals():
    with pytest.raises(TypeError, match="codes_to_dense: code must be a TopK, Ragged or BatchTopK, got"):
        codes_to_dense(integers(3, 4, seed=1), 4)
    with pytest.raises(TypeError, match="fired: code must be"):
        fired((1, 2), 4)
    with pytest.raises(
        ValueError, match="codes_to_dense: num_latents must be at least 0, got num_latents=-1"
    ):
        codes_to_dense(topk(N), -1)
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|index"):
        codes_to_dense(topk(N), 3)
