"""Autoencoders as libraries publish them, written by hand, and dense formulas of what they compute."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from autoencoders import D, K, M, tokens
from safetensors.torch import save_file
from torch import Tensor

from fastsparse.nn import SparseAutoencoder


class Published(NamedTuple):
    """One model's files: tensors, or values beside them, and a configuration, where there is one."""

    weights: str
    tensors: dict[str, Any]
    config: str | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to

    def write(self, folder: Path) -> Path:
        """Into a folder, which is returned."""
        path = folder / self.weights
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, path)
        elif path.suffix == ".npz":
            np.savez(path, **{name: np.asarray(tensor) for name, tensor in self.tensors.items()})
        else:
            torch.save(self.tensors, path)
        if self.config is not None:
            (folder / self.config).write_text(json.dumps(self.options))
        return folder

    def but(self, **options: Any) -> "Published":
        """With other options in its configuration."""
        return self._replace(options=self.options | options)

    def holding(self, **tensors: Any) -> "Published":
        """With other tensors, their dots written as two underscores; None for none."""
        changed = self.tensors | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        return self._replace(tensors={name: tensor for name, tensor in changed.items() if tensor is not None})


def parameters(dtype: torch.dtype = torch.float64) -> SimpleNamespace:
    """Scores both sides of 0, atoms of many norms, a centre away from the origin, some thresholds below 0."""
    shapes = {"W_enc": (M, D), "W_dec": (M, D), "b_enc": (M,), "b_dec": (D,), "r_mag": (M,), "b_mag": (M,)}
    drawn = {
        name: tokens(*shape, dtype=torch.float64, seed=seed)
        for seed, (name, shape) in enumerate(shapes.items(), 20)
    }
    drawn["threshold"] = tokens(M, dtype=torch.float64, seed=30) + 0.5
    drawn["r_mag"] *= 0.3
    assert (drawn["threshold"] < -0.1).any()
    return SimpleNamespace(**{name: tensor.to(dtype) for name, tensor in drawn.items()})


def scores(p: SimpleNamespace, x: Tensor, *, centered: bool) -> Tensor:
    return (x - p.b_dec if centered else x) @ p.W_enc.T + p.b_enc


def largest(z: Tensor, k: int) -> Tensor:
    """Of every row the k largest, the rest 0."""
    found = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter(-1, found.indices, found.values)


def check(sae: SparseAutoencoder, x: Tensor, code: Tensor, output: Tensor) -> None:
    """The code (N, M) and the reconstruction of tokens (N, D)."""
    assert code.count_nonzero() > len(x)  # says something
    torch.testing.assert_close(sae.encode(x).to_dense(M), code)
    torch.testing.assert_close(sae(x), output)


def fastsparse(dtype: torch.dtype = torch.float32) -> Published:
    p = parameters(dtype)
    tensors = {name: getattr(p, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    tensors |= {"threshold": torch.tensor(0.25), "tokens_since_fired": torch.arange(M)}
    options = {"format": "fastsparse", "version": 1, "model": "TopKSAE"}
    options["options"] = {"d_model": D, "num_latents": M, "k": K}
    return Published("model.safetensors", tensors, "config.json", options)


def saelens(architecture: str = "topk", dtype: torch.dtype = torch.float32, **options: Any) -> Published:
    p = parameters(dtype)
    tensors = {"W_enc": p.W_enc.T, "W_dec": p.W_dec, "b_dec": p.b_dec}
    if architecture == "gated":
        tensors |= {"b_gate": p.b_enc, "r_mag": p.r_mag, "b_mag": p.b_mag}
    else:
        tensors["b_enc"] = p.b_enc
    if architecture == "jumprelu":
        tensors["threshold"] = p.threshold
    if architecture.endswith("batchtopk"):
        tensors["topk_threshold"] = torch.tensor(0.5, dtype=torch.float64)
    told = {
        "architecture": architecture, "d_in": D, "d_sae": M, "dtype": str(dtype)[6:], "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.0", "model_name": "gpt2", "hook_name": "blocks.6.hook_z"},
    }  # fmt: skip
    if architecture.endswith("topk"):
        told |= {"k": K, "rescale_acts_by_decoder_norm": False}
    return Published("sae_weights.safetensors", tensors, "cfg.json", told | options)


def sparsify(dtype: torch.dtype = torch.float32, **options: Any) -> Published:
    p = parameters(dtype)
    tensors = {"encoder.weight": p.W_enc, "encoder.bias": p.b_enc, "W_dec": p.W_dec, "b_dec": p.b_dec}
    told = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": False, "num_latents": M, "k": K,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D,
    }  # fmt: skip
    return Published("sae.safetensors", tensors, "cfg.json", told | options)


def dictionary_learning(
    dict_class: str = "AutoEncoderTopK", dtype: torch.dtype = torch.float32, **options: Any
) -> Published:
    p = parameters(dtype)
    linear = {"encoder.weight": p.W_enc, "decoder.weight": p.W_dec.T.contiguous()}
    plain = {"W_enc": p.W_enc.T, "b_enc": p.b_enc, "W_dec": p.W_dec, "b_dec": p.b_dec}
    counts = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.5)}
    tensors = {
        "AutoEncoderTopK": {**counts, **linear, "encoder.bias": p.b_enc, "b_dec": p.b_dec},
        "BatchTopKSAE": {**counts, **linear, "encoder.bias": p.b_enc, "b_dec": p.b_dec},
        "MatryoshkaBatchTopKSAE": {**counts, **plain, "group_sizes": torch.tensor([5, 15, M - 20])},
        "JumpReluAutoEncoder": {**plain, "threshold": p.threshold},
        "GatedAutoEncoder": {
            **linear, "decoder_bias": p.b_dec, "r_mag": p.r_mag, "gate_bias": p.b_enc, "mag_bias": p.b_mag,
        },
        "AutoEncoder": {**linear, "encoder.bias": p.b_enc, "bias": p.b_dec},
        "AutoEncoderNew": {**linear, "encoder.bias": p.b_enc, "decoder.bias": p.b_dec},
    }[dict_class]  # fmt: skip
    trainer = {"trainer_class": "Trainer", "dict_class": dict_class, "activation_dim": D, "dict_size": M}
    trainer |= {"k": K} if "k" in tensors else {}
    trainer |= {"layer": 8, "lm_name": "gpt2"} | options
    return Published("ae.pt", tensors, "config.json", {"trainer": trainer, "buffer": {"ctx_len": 128}})


def gemma_scope(dtype: torch.dtype = torch.float32) -> Published:
    p = parameters(dtype)
    tensors = {"W_enc": p.W_enc.T, "W_dec": p.W_dec, "b_enc": p.b_enc, "b_dec": p.b_dec}
    return Published("params.npz", tensors | {"threshold": p.threshold})


def gemma_scope_2(dtype: torch.dtype = torch.float32, **options: Any) -> Published:
    p = parameters(dtype)
    tensors = {"w_enc": p.W_enc.T, "w_dec": p.W_dec, "b_enc": p.b_enc, "b_dec": p.b_dec}
    told = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "width": M, "l0": 20}
    told |= {"hf_hook_point_in": "model.layers.17.output", "hf_hook_point_out": "model.layers.17.output"}
    told |= {"affine_connection": False, "type": "sae"} | options
    return Published("params.safetensors", tensors | {"threshold": p.threshold}, "config.json", told)


def llama_scope(dtype: torch.dtype = torch.float32, **options: Any) -> Published:
    p = parameters(dtype)
    tensors = {"encoder.weight": p.W_enc, "encoder.bias": p.b_enc}
    tensors |= {"decoder.weight": p.W_dec.T, "decoder.bias": p.b_dec}
    told = {
        "hook_point_in": "blocks.8.hook_resid_post", "hook_point_out": "blocks.8.hook_resid_post",
        "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "expansion_factor": 8,
        "d_model": D, "d_sae": M, "act_fn": "jumprelu", "jump_relu_threshold": 0.75,
        "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 1.7, "out": 1.7},
        "sparsity_include_decoder_norm": True, "use_glu_encoder": False, "top_k": K,
    }  # fmt: skip
    return Published("checkpoints/final.safetensors", tensors, "hyperparams.json", told | options)


def qwen_scope(dtype: torch.dtype = torch.float32) -> Published:
    p = parameters(dtype)
    tensors = {"W_enc": p.W_enc, "W_dec": p.W_dec.T.contiguous(), "b_enc": p.b_enc, "b_dec": p.b_dec}
    return Published(f"SAE-Res-Qwen3-8B-Base-W64K-L0_{K}/layer30.sae.pt", tensors)


def circuit_tracer(dtype: torch.dtype = torch.float32, *, threshold: bool = False) -> Published:
    p = parameters(dtype)
    tensors = {name: getattr(p, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    tensors |= {"activation_function.threshold": p.threshold} if threshold else {}
    return Published("layer_3.safetensors", tensors)


def openai(activation: str | None = "ReLU", dtype: torch.dtype = torch.float32) -> Published:
    p = parameters(dtype)
    found: dict[str, Any] = {"pre_bias": p.b_dec, "latent_bias": p.b_enc}
    found |= {"stats_last_nonzero": torch.arange(M), "latents_activation_frequency": torch.ones(M)}
    found |= {"latents_mean_square": torch.zeros(M), "encoder.weight": p.W_enc}
    found |= {"decoder.weight": p.W_dec.T.contiguous()}
    if activation is not None:
        found["activation"] = activation
    if activation == "TopK":
        found["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"}
    return Published("6.pt", found)


# One of each format.
EXAMPLES = {
    "fastsparse": fastsparse, "saelens": saelens, "sparsify": sparsify,
    "dictionary_learning": dictionary_learning, "gemma_scope": gemma_scope, "gemma_scope_2": gemma_scope_2,
    "llama_scope": llama_scope,
    "qwen_scope": qwen_scope, "circuit_tracer": circuit_tracer, "openai": openai,
}  # fmt: skip
