"""Losses on several levels of one code: prefixes of the latents (Matryoshka), budgets of entries."""

import pytest
import torch
from autoencoders import D, K, M, gradients, scrambled, textbook_code, tokens

from fastsparse.nn import BatchTopKSAE, TopKSAE, fvu

X = tokens(33, D, dtype=torch.float64)


@pytest.mark.parametrize("kind", [TopKSAE, BatchTopKSAE])
@pytest.mark.parametrize("prefixes", [(1,), (3, 4, 39), (7, 20)])
def test_prefixes_are_the_textbooks(kind: type, prefixes: tuple) -> None:
    weights = [0.5 + i for i in range(len(prefixes) + 1)]
    sae = scrambled(kind, prefixes=prefixes, prefix_weights=weights)
    dense = textbook_code(sae, X, sae.k)
    levels = [fvu(dense[:, :m] @ sae.W_dec[:m] + sae.b_dec, X) for m in (*prefixes, M)]
    out = sae.loss(X)
    torch.testing.assert_close(out.fvu, levels[-1])
    expected = sum(w * level for w, level in zip(weights, levels, strict=True))
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(gradients(sae, out.loss), gradients(sae, expected))
    torch.testing.assert_close(out.code.values.sum(), dense.sum())


@pytest.mark.parametrize("kind", [TopKSAE, BatchTopKSAE])
def test_the_first_level_knows_only_its_latents(kind: type) -> None:
    sae = scrambled(kind, prefixes=(10,), prefix_weights=(1, 0))
    before = sae.loss(X).loss
    with torch.no_grad():
        sae.W_dec[10:] = 7
    assert torch.equal(sae.loss(X).loss, before)


def test_budgets_are_the_textbooks() -> None:
    """The k strongest score as the code, and others beside them; AuxK mends what the k leave."""
    sae = scrambled(TopKSAE, budgets=(1, K, 4 * K), budget_weights=(0.5, 1, 1 / 8), aux_k=3, dead_after=9)
    levels = [fvu(textbook_code(sae, X, k) @ sae.W_dec + sae.b_dec, X) for k in sae.budgets]
    expected = 0.5 * levels[0] + levels[1] + levels[2] / 8
    out = sae.loss(X)
    torch.testing.assert_close(out.fvu, levels[1])
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(gradients(sae, out.loss), gradients(sae, expected))
    assert out.code.values.shape == (len(X), K)
    assert out.l0 <= K
    sae.tokens_since_fired[::4] = 9
    dead = sae.dead
    left = (X - textbook_code(sae, X, K) @ sae.W_dec - sae.b_dec).detach()
    aux = fvu(textbook_code(sae, X, 3, dead) @ sae.W_dec, left)
    torch.testing.assert_close(sae.loss(X).aux, aux)


def test_one_prefix_of_all_is_the_plain_loss() -> None:
    plain, levels = scrambled(TopKSAE), scrambled(TopKSAE, prefixes=(5,), prefix_weights=(0, 1))
    torch.testing.assert_close(levels.loss(X).loss, plain.loss(X).loss)
