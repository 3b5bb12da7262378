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

from benchmarks.steps import Parameters, Step


class SparsifyStep(Step):
    def __init__(self, parameters: Parameters, k: int) -> None:
        if parameters.W_enc.device.type == "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its documented switch; read at import
        with contextlib.redirect_stdout(io.StringIO()):  # it prints which decoder it chose
            from sparsify import SparseCoder, SparseCoderConfig

        M, D = parameters.W_enc.shape
        self.coder = SparseCoder(D, SparseCoderConfig(num_latents=M, k=k))
        super().__init__(parameters, k)
        self.coder.encoder.weight.data = self.leaves["W_enc"].data
        self.coder.encoder.bias.data = self.leaves["b_enc"].data
        self.coder.W_dec.data = self.leaves["W_dec"].data
        self.coder.b_dec.data = self.leaves["b_dec"].data
        self.leaves = {
            "W_enc": self.coder.encoder.weight,
            "b_enc": self.coder.encoder.bias,
            "W_dec": self.coder.W_dec,
            "b_dec": self.coder.b_dec,
        }

    def loss(self, x: Tensor) -> Tensor:
        top_acts, top_indices, _ = self.coder.encode(x)
        return F.mse_loss(self.coder.decode(top_acts, top_indices), x)
