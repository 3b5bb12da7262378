"""SPAMS (spams-bin): ``spams.omp``, orthogonal matching pursuit in C++, on as many threads as torch has.

Every step takes the atom that leaves the smallest residual once all coefficients are refitted
(order-recursive matching pursuit), so the answer is another one than matching pursuit's. Nothing is kept
between calls. Signed.
"""

import numpy as np
import torch
from torch import Tensor


def omp(x: Tensor, dictionary: Tensor, k: int) -> Tensor:
    """Codes (N, M) of k atoms a row. SPAMS stores columns: x.T and dictionary.T are theirs as they are."""
    import spams

    # In fp32 it finds nothing at all unless it is given a squared error to stop at.
    codes = spams.omp(x.numpy().T, dictionary.numpy().T, L=k, eps=1e-9, numThreads=torch.get_num_threads())
    return torch.from_numpy(np.ascontiguousarray(codes.toarray().T))
