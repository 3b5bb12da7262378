"""Modules: thin layers over the functional API."""

from fastsparse.nn._model import Model
from fastsparse.nn.batch_topk_sae import BatchTopKSAE
from fastsparse.nn.cross_layer_transcoder import CrossLayerTranscoder
from fastsparse.nn.crosscoder import Crosscoder
from fastsparse.nn.fvu import fvu
from fastsparse.nn.gated_sae import GatedSAE
from fastsparse.nn.group_sparse_sae import GroupSparseSAE
from fastsparse.nn.jump_relu_sae import JumpReLUSAE
from fastsparse.nn.matching_pursuit_sae import MatchingPursuitSAE
from fastsparse.nn.para_gru import ParaGRU
from fastsparse.nn.para_lstm import ParaLSTM
from fastsparse.nn.poly_norm import PolyNorm
from fastsparse.nn.poly_relu import PolyReLU
from fastsparse.nn.relu_sae import ReLUSAE
from fastsparse.nn.sparse_autoencoder import Firings, SAELoss, SparseAutoencoder
from fastsparse.nn.topk_sae import TopKSAE
from fastsparse.nn.transcoder import Transcoder

__all__ = [
    "BatchTopKSAE", "CrossLayerTranscoder", "Crosscoder", "Firings", "GatedSAE", "GroupSparseSAE",
    "JumpReLUSAE", "MatchingPursuitSAE", "Model", "ParaGRU", "ParaLSTM", "PolyNorm", "PolyReLU", "ReLUSAE",
    "SAELoss", "SparseAutoencoder", "TopKSAE", "Transcoder", "fvu",
]  # fmt: skip
