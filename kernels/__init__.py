"""Triton kernels, one module per op; imported when first needed."""
