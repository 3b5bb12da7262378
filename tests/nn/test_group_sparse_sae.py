"""The group-sparse autoencoder against what its paper writes, dense."""

import pytest
import torch
import torch.nn.functional as F
from autoencoders import D, K, M, tokens
from composites import Case, L
from torch import Tensor

from fastsparse import TopK
from fastsparse.nn import GroupSparseSAE, TopKSAE, fvu
from fastsparse.nn._masked_topk import masked_topk
from fastsparse.nn._philox import kept, philox


def mask_of(model: GroupSparseSAE, N: int) -> Tensor:
    """(N, M): which latents the next N pairs keep."""
    pairs = model.pairs_seen + torch.arange(N).unsqueeze(1)
    return kept(pairs, torch.arange(M), model.mask_probability, model.mask_seed)


def dense_codes(model: GroupSparseSAE, x: Tensor, mask: Tensor) -> Tensor:
    """(N, modalities, M): topk(mask * relu(scores))."""
    scores = torch.stack(
        [(x[:, v] - c.b_dec) @ c.W_enc.T + c.b_enc for v, c in enumerate(model.coders)], dim=1
    )
    total = scores.sum(dim=1, keepdim=True).expand_as(scores) if model.shared_support else scores
    eligible = torch.where(mask.unsqueeze(1), total.detach().relu(), -1)
    chosen = eligible.topk(model.k, dim=-1).indices
    return torch.zeros_like(scores).scatter(-1, chosen, 1) * scores.relu() * (eligible > 0)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("probability", [0.0, 0.2, 0.7])
def test_it_is_what_it_says(probability: float, shared: bool) -> None:
    case = Case(GroupSparseSAE, {"mask_probability": probability, "shared_support": shared, "aux_k": 0})
    model, (x,) = case.scrambled(), case.batch()
    model.pairs_seen.fill_(2**33 + 5)
    mask = mask_of(model, len(x))
    z = dense_codes(model, x, mask)
    outputs = torch.stack([z[:, v] @ c.W_dec + c.b_dec for v, c in enumerate(model.coders)], dim=1)
    squares = z.square().sum(dim=1)
    norms = torch.where(squares > 0, torch.where(squares > 0, squares, 1).sqrt(), 0)
    penalty = 0.05 * norms.sum(dim=1).mean()
    dense = fvu(outputs.flatten(1), x.flatten(1)) + penalty
    out = model.loss(x)
    for v, code in enumerate(out.code):
        assert torch.allclose(code.to_dense(M), z[:, v])
        assert code.indices.sort(dim=1).values.diff(dim=1).min() > 0  # each latent once
    assert torch.allclose(out.penalty, penalty)
    assert torch.allclose(out.loss, dense)
    assert torch.isclose(out.l0, (z > 0).sum() / (len(x) * L))
    parameters = list(model.parameters())
    for mine, expected in zip(
        torch.autograd.grad(out.loss, parameters), torch.autograd.grad(dense, parameters), strict=True
    ):
        assert torch.allclose(mine, expected)


def test_without_mask_and_weight_it_is_topk_of_each() -> None:
    case = Case(GroupSparseSAE, {"mask_probability": 0, "group_weight": 0})
    model, (x,) = case.scrambled(), case.batch()
    for v, coder in enumerate(model.coders):
        sae = TopKSAE(D, M, K, dtype=torch.float64)
        sae.load_state_dict(coder.state_dict())
        assert torch.equal(model(x)[:, v], sae(x[:, v]))


def test_modalities_that_say_the_same_cost_root_two_of_one() -> None:
    model = GroupSparseSAE(D, M, K, mask_probability=0, group_weight=0.3)
    model.coders[1].load_state_dict(model.coders[0].state_dict())
    x = tokens(20, D)
    out = model.loss(torch.stack([x, x], dim=1))
    expected = 0.3 * 2**0.5 * out.code[0].values.sum(dim=1).mean()
    assert torch.isclose(out.penalty, expected)


def test_masks_are_of_training_and_move_on_with_it() -> None:
    case = Case(GroupSparseSAE, {"mask_probability": 0.5})
    model, (x,) = case.scrambled(), case.batch()
    first = model.loss(x)
    again = model.loss(x)
    assert torch.equal(first.loss, again.loss)  # as a checkpointed forward wants it
    model.count_firings_(first.code)
    assert model.pairs_seen == len(x)
    later = model.loss(x)
    assert not torch.equal(first.code[0].indices, later.code[0].indices)
    model.eval()
    for coded, code in zip(model.loss(x).code, model.encode(x), strict=True):
        assert torch.equal(coded.indices, code.indices)
    plain = Case(GroupSparseSAE, {"mask_probability": 0}).scrambled()
    assert torch.equal(model(x), plain(x))


def test_one_mask_serves_all_modalities_of_a_pair() -> None:
    case = Case(GroupSparseSAE, {"mask_probability": 0.6, "k": 12})
    model, (x,) = case.scrambled(), case.batch()
    mask = mask_of(model, len(x))
    for code in model.loss(x).code:
        assert (mask.gather(1, code.indices) | (code.values == 0)).all()


def test_philox_by_its_authors_known_answers() -> None:
    full = 2**32 - 1
    for word, seed, answer in [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (full, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ]:
        counter = (torch.tensor([word, word]),) * 4
        assert [part.tolist() for part in philox(counter, seed)] == [[part] * 2 for part in answer]
    counter = tuple(torch.tensor(word) for word in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344))
    answer = (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    assert tuple(int(word) for word in philox(counter, 0xA4093822 | 0x299F31D0 << 32)) == answer


def test_masks_are_fair_and_differ() -> None:
    masks = [kept(torch.arange(500).unsqueeze(1), torch.arange(300), 0.3, seed) for seed in (0, 1)]
    for mask in masks:
        assert abs(mask.double().mean() - 0.7) < 0.005
        assert (mask.double().mean(dim=0) - 0.7).abs().max() < 0.1
        assert (mask.double().mean(dim=1) - 0.7).abs().max() < 0.1
    assert abs((masks[0] == masks[1]).double().mean() - (0.7**2 + 0.3**2)) < 0.01
    assert kept(torch.arange(10), torch.arange(10), 0.0, 0).all()


def test_more_are_fetched_where_too_few_are_eligible() -> None:
    """The first row's largest are all masked, the second has too few positive ones."""
    scores = torch.stack([torch.arange(64, 0, -1.0), torch.arange(3, -61, -1.0).relu()])
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[0, :60] = False
    mask[1, 1] = False
    fetched = []

    def encode(count: int) -> TopK:
        fetched.append(count)
        return TopK(*scores.topk(count, dim=1))

    code = masked_topk(encode, lambda indices: mask.gather(1, indices), 3, 64, 0.9)
    assert fetched == sorted(set(fetched))
    assert len(fetched) > 2
    assert code.values.tolist() == [[4.0, 3.0, 2.0], [3.0, 1.0, 0.0]]
    assert code.indices[0].tolist() == [60, 61, 62]


def test_sharing_latents_is_learnt() -> None:
    """Of a cause that two modalities see, the group's norm makes a latent of both, plain TopK one of each."""
    generator = torch.Generator().manual_seed(0)
    causes = torch.randn(2, M // 2, D, generator=generator)
    found = []
    for weight in (0.0, 0.1):
        model = GroupSparseSAE(
            D, M, 2, mask_probability=0.2, group_weight=weight, aux_k=0, generator=generator.manual_seed(1)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(300):
            chosen = torch.randint(M // 2, (64, 2), generator=generator)
            x = torch.stack([F.embedding(chosen, causes[v]).sum(dim=1) for v in range(2)], dim=1)
            optimizer.zero_grad()
            out = model.loss(x)
            out.loss.backward()
            model.after_backward_()
            optimizer.step()
            model.after_step_()
            model.count_firings_(out.code)
        one, two = (code.to_dense(M) > 0 for code in model.encode(x))
        found.append(((one & two).sum() / (one | two).sum()).item())
    assert found[1] > 3 * found[0]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"mask_probability": 1.0}, ValueError, "GroupSparseSAE: mask_probability must be below 1, got 1.0"),
        ({"mask_probability": -0.1}, ValueError, "GroupSparseSAE: mask_probability must be finite and at"),
        ({"group_weight": -1}, ValueError, "GroupSparseSAE: group_weight must be finite and at least 0"),
        ({"num_modalities": 0}, ValueError, "GroupSparseSAE: num_modalities must be at least 1"),
        ({"shared_support": 1}, TypeError, "GroupSparseSAE: shared_support must be a bool"),
        ({"groups": 2}, TypeError, "GroupSparseSAE has no option groups, got 2"),
    ],
)
def test_options_that_are_refused(options: dict, error: type, said: str) -> None:
    with pytest.raises(error, match=f"^{said}"):
        Case(GroupSparseSAE, options).make()


def test_sizes_of_tokens() -> None:
    assert GroupSparseSAE.sizes_of((2, 5), None) == {"d_model": 5, "num_modalities": 2}
    for inputs, targets in [((5,), None), ((2, 5), (2, 5))]:
        with pytest.raises(ValueError, match=r"^GroupSparseSAE reconstructs inputs"):
            GroupSparseSAE.sizes_of(inputs, targets)
