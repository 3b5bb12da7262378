"""Random bits as a function of where they are wanted: nothing is stored, and all backends agree."""

from torch import Tensor

_WORD = 2**32 - 1
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_STEPS_OF_KEY = 0x9E3779B9, 0xBB67AE85


def philox(counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], seed: int) -> tuple:
    """Four words of 32 random bits for each counter, by Philox 4x32-10.

    Args:
        counter: four words of it, int64 that broadcast.
        seed: 64 bits.

    Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
    """
    a, b, c, d = counter
    key = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        (high_a, low_a), (high_c, low_c) = _product(a, _MULTIPLIERS[0]), _product(c, _MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ key[0], low_c, high_a ^ d ^ key[1], low_a
        key = tuple(word + step & _WORD for word, step in zip(key, _STEPS_OF_KEY, strict=True))
    return a, b, c, d


def _product(word: Tensor | int, factor: int) -> tuple[Tensor | int, Tensor | int]:
    """The high and the low word; int64 overflows to the right bits."""
    product = word * factor
    return product >> 32 & _WORD, product & _WORD


def kept(pairs: Tensor, latents: Tensor, probability: float, seed: int) -> Tensor:
    """Which latents each of a run's pairs keeps: a bool, False with this probability.

    Args:
        pairs: int64, numbers of pairs, that broadcast with latents.
        latents: int64.
    """
    words, *_ = philox((pairs & _WORD, pairs >> 32, latents, 0), seed)
    return words >= round(probability * 2**32)
