"""The three products, and a decoder that calls them."""

import torch
from dense_products import (
    triton_dense_dense_sparseout_matmul,
    triton_sparse_dense_matmul,
    triton_sparse_transpose_dense_matmul,
)


class TritonDecoderAutograd(torch.autograd.Function):
    """``code @ weight.T`` of a weight (D, M)."""

    @staticmethod
    def forward(ctx, inds, vals, weight):
        ctx.save_for_backward(inds, vals, weight)
        return triton_sparse_dense_matmul(inds, vals, weight.T)

    @staticmethod
    def backward(ctx, grad):
        inds, vals, weight = ctx.saved_tensors
        d_vals = triton_dense_dense_sparseout_matmul(grad, weight, inds)
        d_weight = triton_sparse_transpose_dense_matmul(inds, vals, grad, N=weight.shape[1]).T
        return None, d_vals, d_weight
