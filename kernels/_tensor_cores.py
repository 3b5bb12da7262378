"""How exact a GPU's tensor cores are."""

import torch

# For tests: taken in place of what the device is known for.
accumulation: float | None = None


def accumulation_unit(device: torch.device) -> float:
    """How far sums of D products of bf16 (or fp16) x and w may be off, in units of D 2^-24 |x| |w|.

    Tensor cores add L products to a sum at once: these L + 1 are cut to F bits behind the leading one of the
    largest among them, the new sum to fp32. None of them exceeds |x| |w|, nor does a partial sum, by Cauchy
    and Schwarz. So L products are off by at most ((L + 1) 2^-F + 2^-23) |x| |w|, and D of them by
        L = 16, F = 25 (9.x, 10.x, 12.x):  0.66 D 2^-24; where older instructions have L = 8, 0.81 D 2^-24
        L = 8,  F = 24 (8.x):              1.38 D 2^-24
        L = 8,  F = 23 (at the least):     2.50 D 2^-24
    (L, F: github.com/microsoft/MMA-Sim, and Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores").
    Added to this, 8 2^-24 |x| |w| are enough for a last step that isn't full, for bias and scale.
    """
    if accumulation is not None:
        return accumulation
    if device.type != "cuda" or torch.version.hip:
        return 3.0
    return {8: 1.75, 9: 1.0, 10: 1.0, 12: 1.0}.get(torch.cuda.get_device_capability(device)[0], 3.0)
