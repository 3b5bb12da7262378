"""Stands in for openai/sparse_autoencoder: what its adapter patches, in dense PyTorch."""

from .model import Autoencoder

__all__ = ["Autoencoder"]
