"""The autoencoder that is trained, by autograd."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .kernels import *  # noqa: F403 - as there, where names of kernels are looked up here
from .kernels import TritonDecoderAutograd


@dataclass
class ShardingComms:
    n_replicas: int = 1
    n_op_shards: int = 1
    dp_rank: int = 0
    sh_rank: int = 0
    dp_comm: Any = None
    sh_comm: Any = None
    _rank: int = 0


def sharded_topk(x, k, sh_comm, capacity_factor=None):
    if sh_comm is not None and sh_comm.size() > 1:
        raise NotImplementedError("what stands in for the library is of one rank")
    found = x.topk(k, dim=-1)
    return found.indices, found.values


class FastAutoencoder(nn.Module):
    def __init__(self, n_dirs_local, d_model, k, auxk, dead_steps_threshold, comms=None):
        super().__init__()
        self.n_dirs_local, self.d_model, self.k, self.auxk = n_dirs_local, d_model, k, auxk
        self.comms = comms or ShardingComms()
        self.encoder = nn.Linear(d_model, n_dirs_local, bias=False)
        self.decoder = nn.Linear(n_dirs_local, d_model, bias=False)
        self.decoder.weight.data = torch.randn(n_dirs_local, d_model).T
        self.pre_bias = nn.Parameter(torch.zeros(d_model))
        self.latent_bias = nn.Parameter(torch.zeros(n_dirs_local))
        self.register_buffer("stats_last_nonzero", torch.zeros(n_dirs_local, dtype=torch.int64))

        def auxk_mask_fn(x):
            x.data.mul_(self.stats_last_nonzero > dead_steps_threshold)
            return x

        self.auxk_mask_fn = auxk_mask_fn

    def forward(self, x):
        pre = F.linear(x.detach() - self.pre_bias, self.encoder.weight, self.latent_bias)
        inds, _ = sharded_topk(pre.detach(), k=self.k, sh_comm=self.comms.sh_comm, capacity_factor=4)
        vals = pre.gather(1, inds)
        has_fired = torch.zeros_like(pre.detach()).scatter(1, inds, vals.detach()) > 1e-3
        self.stats_last_nonzero[has_fired.any(dim=0)] = 0
        self.stats_last_nonzero += 1
        aux_inds = aux_vals = None
        if self.auxk is not None:
            dead = self.auxk_mask_fn(torch.ones_like(pre))
            aux_inds, _ = sharded_topk((pre * dead).detach(), k=self.auxk, sh_comm=self.comms.sh_comm)
            aux_vals = (pre * dead).gather(1, aux_inds).relu()
        return self.decode_sparse(inds, vals.relu()), {"auxk_inds": aux_inds, "auxk_vals": aux_vals}

    def decode_sparse(self, inds, vals):
        return TritonDecoderAutograd.apply(inds, vals, self.decoder.weight) + self.pre_bias
