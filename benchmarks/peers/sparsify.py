"""EleutherAI sparsify (eai-sparsify): ``SparseCoder.encode`` and ``.decode``, as its ``forward`` calls them.

``encode`` is ``fused_encoder``, which makes the N x M matrix and scatters its backward through N x k x D
contributions. ``decode`` is ``decoder_impl``: on a CPU its own choice is ``eager_decode``, an
``embedding_bag`` (the Triton kernel can't run there). Its loss (FVU) is replaced by the mean square error,
the loss of every contender here.
"""

import contextlib
import io
import os

import torch.nn.functional as F
from torch import Tensor

from benchmarks.steps import Parameters, PeerStep


class SparsifyStep(PeerStep):
    def __init__(self, parameters: Parameters, k: int) -> None:
        if parameters["W_enc"].device.type == "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its documented switch; read at import
        with contextlib.redirect_stdout(io.StringIO()):  # it prints which decoder it chose
            from sparsify import SparseCoder, SparseCoderConfig

        M, D = parameters["W_enc"].shape
        coder = SparseCoder(D, SparseCoderConfig(num_latents=M, k=k))
        leaves = {
            "W_enc": coder.encoder.weight, "b_enc": coder.encoder.bias,
            "W_dec": coder.W_dec, "b_dec": coder.b_dec,
        }  # fmt: skip
        super().__init__(coder, leaves, parameters)

    def loss(self, x: Tensor) -> Tensor:
        top_acts, top_indices, _ = self.module.encode(x)
        return F.mse_loss(self.module.decode(top_acts, top_indices), x)
