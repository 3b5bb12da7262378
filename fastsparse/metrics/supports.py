"""Codes as hashes: which latents a token has, and how far such sets are apart.

A set of latents is M bits, eight to a byte. PyTorch has no operation that counts bits: a table of 256 does.
"""

import torch
from torch import Tensor

from fastsparse._validation import check_count, check_tensor
from fastsparse.functional import BatchTopK, Pursuit, Ragged, TopK
from fastsparse.metrics._entries import entries_of

_ONES = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)
_PAIRS = 1 << 24  # bytes compared at a time


def support_bits(code: TopK | Ragged | BatchTopK | Pursuit, num_latents: int) -> Tensor:
    """Pack which latents of every token have a nonzero value into bits.

    Args:
        code: of N tokens.
        num_latents: M.

    Returns:
        (N, ceil(M / 8)) uint8: latent m is bit m % 8 of byte m // 8.

    Raises:
        TypeError, ValueError: code is no code, or num_latents no positive integer.
        IndexError: the code holds latents that there are none of.

    Example:
        >>> import torch
        >>> from fastsparse import TopK
        >>> from fastsparse.metrics import support_bits
        >>> support_bits(TopK(torch.ones(1, 3), torch.tensor([[0, 3, 9]])), 10).tolist()
        [[9, 2]]
    """
    M = check_count("support_bits", "num_latents", num_latents, 1)
    entries = entries_of("support_bits", code, M)
    width = -(-M // 8)
    bits = torch.zeros(entries.num_tokens * width, dtype=torch.int32, device=entries.latents.device)
    places = entries.tokens * width + entries.latents // 8
    bits.index_add_(0, places, (1 << entries.latents % 8).to(torch.int32))  # each bit once, so no carries
    return bits.view(entries.num_tokens, width).to(torch.uint8)


def hamming(a: Tensor, b: Tensor) -> Tensor:
    """Count in how many latents each set of one batch differs from each of another.

    Args:
        a, b: (A, W) and (B, W) uint8, of :func:`support_bits`.

    Returns:
        (A, B) int64.

    Raises:
        TypeError, ValueError: the dtypes or widths don't fit.

    Example:
        >>> import torch
        >>> from fastsparse.metrics import hamming
        >>> hamming(torch.tensor([[9, 2]]).byte(), torch.tensor([[8, 0], [9, 2]]).byte()).tolist()
        [[2, 0]]
    """
    for name, bits in (("a", a), ("b", b)):
        check_tensor("hamming", name, bits)
        if bits.dtype != torch.uint8 or bits.dim() != 2 or bits.shape[1] != a.shape[-1]:
            raise TypeError(
                f"hamming: {name} must be uint8 of one width, (N, W), got {str(bits.dtype)[6:]} of shape "
                f"{tuple(bits.shape)}"
            )
    ones = _ONES.to(a.device)
    found = torch.empty(len(a), len(b), dtype=torch.int64, device=a.device)
    for rows in torch.arange(len(a)).split(max(1, _PAIRS // max(1, b.numel()))):
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        found[here] = ones[(a[here].unsqueeze(1) ^ b).int()].sum(dim=-1, dtype=torch.int64)
    return found


def redundancy(code: TopK | Ragged | BatchTopK | Pursuit, num_latents: int) -> float:
    """Say what share of tokens has a set of latents that an earlier token had: 1 - distinct / N.

    Args:
        code: of N tokens, at least one.
        num_latents: M.

    Raises:
        TypeError, ValueError: code is no code, holds no token, or num_latents is no positive integer.
        IndexError: the code holds latents that there are none of.

    Example:
        >>> import torch
        >>> from fastsparse import TopK
        >>> from fastsparse.metrics import redundancy
        >>> redundancy(TopK(torch.ones(3, 2), torch.tensor([[0, 1], [1, 0], [0, 2]])), 3)  # 2 of 3
        0.33333333333333337
    """
    bits = support_bits(code, num_latents)
    if len(bits) == 0:
        raise ValueError("redundancy: code must hold at least one token, got none")
    return 1 - len(torch.unique(bits, dim=0)) / len(bits)
