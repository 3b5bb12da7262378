"""Small models made of coders, in fp64 and away from where they start, and what they are trained on."""

from typing import NamedTuple

import torch
from autoencoders import D, K, M, tokens
from torch import Tensor

from fastsparse.nn import Crosscoder, CrossLayerTranscoder, GroupSparseSAE, Model, Transcoder

L, D_OUT = 3, 7
_SIZES = {
    Transcoder: {"d_in": D, "d_out": D_OUT},
    Crosscoder: {"d_model": D, "num_sources": L},
    CrossLayerTranscoder: {"d_model": D, "num_layers": L},
    GroupSparseSAE: {"d_model": D, "num_modalities": L},
}
JUMP = {"encoder": "jumprelu", "threshold": 0.5, "bandwidth": 0.6, "penalty_weight": 0.01}


class Case(NamedTuple):
    kind: type[Model]
    options: dict

    def make(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
        k = {} if self.options.get("encoder") == "jumprelu" else {"k": K}
        options = _SIZES[self.kind] | k | self.options
        generator = torch.Generator().manual_seed(seed)
        return self.kind(num_latents=M, dtype=dtype, generator=generator, **options)

    def scrambled(self, seed: int = 2) -> Model:
        """In fp64, with every trained parameter away from its initial value."""
        model = self.make(dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn(
                        parameter.shape, generator=generator, dtype=parameter.dtype
                    )
        model.after_step_()
        return model

    def batch(self, N: int = 20, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, ...]:
        """What :meth:`loss` takes."""
        if self.kind is Transcoder:
            return tokens(N, D, dtype=dtype, seed=seed), tokens(N, D_OUT, dtype=dtype, seed=seed + 1)
        x = tokens(N, L, D, dtype=dtype, seed=seed)
        paired = self.kind is CrossLayerTranscoder
        return (x, tokens(N, L, D, dtype=dtype, seed=seed + 1)) if paired else (x,)

    @property
    def name(self) -> str:
        return " ".join([self.kind.__name__, *(f"{name}={value}" for name, value in self.options.items())])


_ENCODERS = [
    {},
    {"encoder": "batchtopk", "k": 4.7, "prefixes": (8, 20)},
    {**JUMP, "dense": "sparse", "penalty": "tanh", "pre_act_weight": 0.02, "unit_norm": False},
]
POLYNOMIAL = {"decoder": "polynomial", "ranks": (5, 4, 2)}
CASES = [
    *(
        Case(kind, options)
        for kind in (Transcoder, Crosscoder, CrossLayerTranscoder)
        for options in _ENCODERS
    ),
    Case(Transcoder, {"skip": True}),
    Case(Transcoder, {"skip": True, **POLYNOMIAL}),
    Case(Crosscoder, {**JUMP, "dense": "stripes", **POLYNOMIAL}),
    Case(CrossLayerTranscoder, {"activation": "abs", **POLYNOMIAL}),
    Case(GroupSparseSAE, {}),
    Case(GroupSparseSAE, {"shared_support": True, "mask_probability": 0.5, "prefixes": (8,)}),
    Case(GroupSparseSAE, {"mask_probability": 0.0, "group_weight": 0.0, "mask_seed": 7, **POLYNOMIAL}),
]
