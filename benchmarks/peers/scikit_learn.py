"""scikit-learn: ``orthogonal_mp_gram``, orthogonal matching pursuit by a Gram matrix that was made before.

It refits all coefficients in every step, and copies the Gram matrix for every row. Signed.
"""

import torch
from torch import Tensor


def omp(x: Tensor, dictionary: Tensor, k: int, gram: Tensor) -> Tensor:
    """Codes (N, M) of k atoms a row."""
    from sklearn.linear_model import orthogonal_mp_gram

    products = (x @ dictionary.T).numpy().T
    codes = orthogonal_mp_gram(gram.numpy(), products, n_nonzero_coefs=k)
    return torch.from_numpy(codes.reshape(len(dictionary), len(x)).T)
