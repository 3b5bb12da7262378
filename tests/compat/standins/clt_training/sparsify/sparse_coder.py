"""A coder of one or several targets."""

from dataclasses import dataclass

import torch
from torch import nn

from .fused_encoder import fused_encoder
from .utils import decoder_impl


@dataclass
class SparseCoderConfig:
    activation: str = "topk"
    num_latents: int = 0
    k: int = 32
    transcode: bool = False
    n_targets: int = 0
    normalize_io: bool = False
    use_fp8: bool = False


class SparseCoder(nn.Module):
    def __init__(self, d_in, cfg, device="cpu", dtype=None):
        super().__init__()
        self.cfg = cfg
        options = {"device": device, "dtype": dtype}
        self.encoder = nn.Linear(d_in, cfg.num_latents, **options)
        for name, size in (("W_dec", (cfg.num_latents, d_in)), ("b_dec", (d_in,))):
            if cfg.n_targets and cfg.transcode:
                targets = nn.ParameterList(torch.zeros(size, **options) for _ in range(cfg.n_targets))
                setattr(self, f"{name}s", targets)
                setattr(self, name, targets[0])
            else:
                setattr(self, name, nn.Parameter(torch.zeros(size, **options)))
        if cfg.normalize_io:
            self.register_buffer("in_norm", torch.ones(1, **options))

    @property
    def dtype(self):
        return self.encoder.weight.dtype

    def normalize_input(self, x):
        return x * (x.shape[-1] ** 0.5 / self.in_norm) if self.cfg.normalize_io else x

    def encode(self, x):
        x, cfg = self.normalize_input(x), self.cfg
        x = x if cfg.transcode else x - self.b_dec
        weight, bias = self.encoder.weight, self.encoder.bias
        return fused_encoder(x, weight, bias, cfg.k, cfg.activation, cfg.use_fp8)

    def decode(self, top_acts, top_indices, index=0):
        W_dec = self.W_decs[index] if hasattr(self, "W_decs") else self.W_dec
        b_dec = self.b_decs[index] if hasattr(self, "b_decs") else self.b_dec
        return decoder_impl(top_indices, top_acts.to(self.dtype), W_dec) + b_dec
