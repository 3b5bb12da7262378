"""Modules: thin layers over the functional API."""

from fastsparse.nn.fvu import fvu
from fastsparse.nn.matching_pursuit_sae import MatchingPursuitSAE
from fastsparse.nn.para_gru import ParaGRU
from fastsparse.nn.para_lstm import ParaLSTM
from fastsparse.nn.sparse_autoencoder import SAELoss, SparseAutoencoder
from fastsparse.nn.topk_sae import TopKSAE

__all__ = ["MatchingPursuitSAE", "ParaGRU", "ParaLSTM", "SAELoss", "SparseAutoencoder", "TopKSAE", "fvu"]
