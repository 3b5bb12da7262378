"""The autoencoders that were published."""

import torch
import torch.nn.functional as F
from torch import nn


class TopK(nn.Module):
    def __init__(self, k, postact_fn=None):
        super().__init__()
        self.k = k
        self.postact_fn = nn.ReLU() if postact_fn is None else postact_fn

    def forward(self, x):
        values, indices = x.topk(self.k, dim=-1)
        return x.new_zeros(x.shape).scatter(-1, indices, self.postact_fn(values))


class TiedTranspose(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return x @ self.linear.weight

    @property
    def weight(self):
        return self.linear.weight.T

    @property
    def bias(self):
        return self.linear.bias


class Autoencoder(nn.Module):
    def __init__(self, n_latents, n_inputs, activation=None, tied=False, normalize=False):
        super().__init__()
        self.pre_bias = nn.Parameter(torch.zeros(n_inputs))
        self.encoder = nn.Linear(n_inputs, n_latents, bias=False)
        self.latent_bias = nn.Parameter(torch.zeros(n_latents))
        self.activation = nn.ReLU() if activation is None else activation
        self.decoder = TiedTranspose(self.encoder) if tied else nn.Linear(n_latents, n_inputs, bias=False)
        self.normalize = normalize
        self.register_buffer("stats_last_nonzero", torch.zeros(n_latents, dtype=torch.int64))

    def encode_pre_act(self, x, latent_slice=slice(None)):
        weight, bias = self.encoder.weight[latent_slice], self.latent_bias[latent_slice]
        return F.linear(x - self.pre_bias, weight, bias)

    def preprocess(self, x):
        if not self.normalize:
            return x, {}
        mu = x.mean(dim=-1, keepdim=True)
        std = x.std(dim=-1, keepdim=True)
        return (x - mu) / (std + 1e-5), {"mu": mu, "std": std}

    def encode(self, x):
        x, info = self.preprocess(x)
        return self.activation(self.encode_pre_act(x)), info

    def decode(self, latents, info=None):
        recons = self.decoder(latents) + self.pre_bias
        return recons * info["std"] + info["mu"] if self.normalize else recons

    def forward(self, x):
        x, info = self.preprocess(x)
        pre = self.encode_pre_act(x)
        latents = self.activation(pre)
        self.stats_last_nonzero[(latents != 0).any(dim=0)] = 0
        self.stats_last_nonzero += 1
        return pre, latents, self.decode(latents, info)
