"""Modules: thin layers over the functional API."""

from fastsparse.nn.fvu import fvu
from fastsparse.nn.topk_sae import SAELoss, TopKSAE

__all__ = ["SAELoss", "TopKSAE", "fvu"]
