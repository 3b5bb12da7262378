import pytest
import torch

from benchmarks.checks import TopKOracle, close
from benchmarks.harness import WrongAnswer
from fastsparse import reference

N, D, M, K = 40, 48, 256, 8


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((N, D), (M, D), (M,)))
    return x, weight, bias


@pytest.fixture
def oracle(problem):
    return TopKOracle.of(*problem, K)


@pytest.fixture
def answer(problem):
    return reference.topk_encode(*problem, K)


def test_the_oracle_is_the_reference(problem, oracle):
    values, indices = reference.topk_encode(*problem, K + 1, "none")
    torch.testing.assert_close(oracle.scores, values)
    assert torch.equal(oracle.indices, indices)


def test_the_oracle_in_blocks_is_the_oracle(problem, oracle, monkeypatch):
    monkeypatch.setattr("benchmarks.checks.BLOCK", 600)
    blocked = TopKOracle.of(*problem, K)
    torch.testing.assert_close(blocked.scores, oracle.scores)
    torch.testing.assert_close(blocked.tolerance, oracle.tolerance)
    assert torch.equal(blocked.indices, oracle.indices)


def test_the_reference_passes(oracle, answer):
    assert f"{N} index sets" in oracle.check(answer)


def test_any_order_passes(oracle, answer):
    order = torch.randperm(K)
    oracle.check((answer[0][:, order], answer[1][:, order]))


def test_all_latents_pass(problem):
    TopKOracle.of(*problem, M).check(reference.topk_encode(*problem, M))


def changed(tensor: torch.Tensor, place: tuple[int, int], value: float) -> torch.Tensor:
    out = tensor.clone()
    out[place] = value
    return out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v, i: (v * 1.001, i), "values differ"),
        (lambda v, i: (changed(v, (3, 2), float("nan")), i), "values differ"),
        (lambda v, i: (v, changed(i, (3, 2), int(i[3, 1]))), "twice"),
        (lambda v, i: (v, changed(i, (3, 2), M)), "indices must be in"),
        (lambda v, i: (v, changed(i, (3, 2), -1)), "indices must be in"),
        (lambda v, i: (v, i.roll(1, 0)), "miss a latent"),
        (lambda v, i: (v, i.roll(1, 1)), "another latent"),
        (lambda v, i: (v[:, :-1], i[:, :-1]), "shapes"),
        (lambda v, i: (v[:-1], i[:-1]), "shapes"),
        (lambda v, i: (v, i[:, :-1]), "shapes"),
    ],
)
def test_a_wrong_answer_is_refused(oracle, answer, spoil, message):
    with pytest.raises(WrongAnswer, match=message):
        oracle.check(spoil(*answer))


def test_a_wrong_latent_is_refused_even_where_the_cut_is_a_tie(problem):
    x, weight, bias = problem
    twins = torch.cat([weight, weight]), torch.cat([bias, bias])
    oracle = TopKOracle.of(x, *twins, 1)
    values, indices = reference.topk_encode(x, *twins, 1)
    with pytest.raises(WrongAnswer, match="another latent"):
        oracle.check((values, changed(indices, (7, 0), (int(indices[7, 0]) + 1) % M)))


def test_one_wrong_latent_is_refused(oracle, answer):
    values, indices = answer
    absent = next(m for m in range(M) if m not in oracle.indices[5])
    with pytest.raises(WrongAnswer, match="1 rows miss"):
        oracle.check((values, changed(indices, (5, 0), absent)))


def test_a_tie_may_fall_either_way(problem):
    x, weight, bias = problem
    twins = torch.cat([weight, weight]), torch.cat([bias, bias])
    oracle = TopKOracle.of(x, *twins, 1)
    values, indices = reference.topk_encode(x, *twins, 1)
    oracle.check((values, indices))
    oracle.check((values, indices + M))


def test_bf16_scores_need_bf16_tolerance(problem):
    x, weight, bias = (tensor.bfloat16() for tensor in problem)
    oracle = TopKOracle.of(x, weight, bias, K)
    rounded = torch.topk(torch.relu(torch.nn.functional.linear(x, weight, bias)), K)
    with pytest.raises(WrongAnswer):
        oracle.check(rounded)
    oracle.check(rounded, selected=2**-8, stored=2**-8)
    exact = reference.topk_encode(x, weight, bias, K)  # exact selection, values rounded at the end
    oracle.check(exact, stored=2**-8)


def test_close_measures_the_relative_error():
    expected = torch.tensor([3.0, 4.0])
    close("a", expected * (1 + 1e-6), expected, 1e-5)
    with pytest.raises(WrongAnswer, match="relative error"):
        close("a", expected * 1.1, expected, 1e-2)
    with pytest.raises(WrongAnswer, match="relative error nan"):
        close("a", expected * float("nan"), expected, 1e-2)
    with pytest.raises(WrongAnswer, match="shape"):
        close("a", expected[:1], expected, 1e-2)
