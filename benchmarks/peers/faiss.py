"""FAISS (faiss-cpu): ``faiss.knn(x, W, k, metric=faiss.METRIC_INNER_PRODUCT)``.

Exact top-k inner-product search is TopK encoding without bias, activation and gradient. FAISS multiplies in
blocks and keeps heaps, so it never holds N x M either. It is given as many threads as torch has.
"""

import torch
from torch import Tensor


def encode(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, indices), both (N, k), rectified to stand for the same function as a TopK encoder."""
    import faiss

    if faiss.omp_get_max_threads() != torch.get_num_threads():
        faiss.omp_set_num_threads(torch.get_num_threads())
    values, indices = faiss.knn(x.numpy(), weight.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(values).relu_(), torch.from_numpy(indices)
