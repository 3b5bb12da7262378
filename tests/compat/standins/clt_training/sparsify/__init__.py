"""Stands in for EleutherAI/clt-training: what its adapter patches, in dense PyTorch."""

from .sparse_coder import SparseCoder, SparseCoderConfig

__all__ = ["SparseCoder", "SparseCoderConfig"]
