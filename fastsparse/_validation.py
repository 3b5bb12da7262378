"""Checks of tensor arguments; every message names the op, the argument, what it was and what it should be."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def check_tensor(op: str, name: str, tensor: Tensor) -> None:
    """A dense tensor with data."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense (strided) tensor, got layout {tensor.layout}")
    if tensor.is_quantized:
        raise TypeError(f"{op}: {name} must not be quantised, got {tensor.dtype}")
    if tensor.device.type == "meta":
        raise TypeError(f"{op}: {name} must hold data, got a tensor on the meta device")


def check_float(op: str, name: str, tensor: Tensor) -> None:
    """A dense tensor of a dtype that the kernels compute in."""
    # Valid calls get by with this one line: what a tiny call costs is mostly its checks.
    if isinstance(tensor, Tensor) and tensor.dtype in DTYPES and tensor.layout is torch.strided:
        if tensor.is_meta:
            check_tensor(op, name, tensor)
        return
    check_tensor(op, name, tensor)
    raise TypeError(
        f"{op}: {name} must be float32, bfloat16, float16 or float64, got {str(tensor.dtype)[6:]}"
    )


def check_matrix(op: str, name: str, tensor: Tensor) -> tuple[int, int]:
    """A floating (M, D) matrix; returns its sizes."""
    check_float(op, name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{op}: {name} must have shape (M, D), got shape {_shape(tensor)}")
    return tensor.shape


def check_rows(op: str, name: str, tensor: Tensor, D: int) -> None:
    """Floating rows (..., D)."""
    check_float(op, name, tensor)
    if tensor.dim() < 1 or tensor.shape[-1] != D:
        raise ValueError(f"{op}: {name} must have shape (..., D) with D = {D}, got shape {_shape(tensor)}")


def check_vector(op: str, name: str, tensor: Tensor, symbol: str, size: int) -> None:
    """A floating vector."""
    check_float(op, name, tensor)
    if tensor.shape != (size,):
        raise ValueError(f"{op}: {name} must have shape ({symbol},) = ({size},), got shape {_shape(tensor)}")


def check_mask(op: str, name: str, tensor: Tensor, M: int) -> None:
    """A bool vector over the latents."""
    check_tensor(op, name, tensor)
    if tensor.dtype != torch.bool:
        raise TypeError(f"{op}: {name} must be bool, got {str(tensor.dtype)[6:]}")
    if tensor.shape != (M,):
        raise ValueError(f"{op}: {name} must have shape (M,) = ({M},), got shape {_shape(tensor)}")


def check_indices(op: str, indices: Tensor) -> None:
    """Latent indices (..., k) int64. Their range is checked by the kernels, which read them anyway."""
    check_tensor(op, "indices", indices)
    if indices.dtype != torch.int64:
        raise TypeError(f"{op}: indices must be int64, got {str(indices.dtype)[6:]}")
    if indices.dim() < 1:
        raise ValueError(f"{op}: indices must have shape (..., k), got a scalar")


def check_range(op: str, indices: Tensor, M: int) -> None:
    """Every index is in [0, M): for the reference, since PyTorch's indexing would count -1 from the end.

    On the CPU only, since elsewhere it would wait for the device, except under FASTSPARSE_DEBUG=1; not while
    tracing, since it reads the data, nor while a CUDA graph is being captured.
    """
    if torch.compiler.is_compiling():
        return
    if indices.device.type != "cpu" and (os.environ.get("FASTSPARSE_DEBUG") != "1" or capturing(indices)):
        return
    outside = (indices < 0) | (indices >= M)
    if outside.any():
        n, j = torch.nonzero(outside)[0].tolist()
        raise IndexError(f"{op}: indices[{n}, {j}] must be in [0, {M}), got {indices[n, j].item()}")


def check_eligible(weight: Tensor, k: int, latent_mask: Tensor | None) -> None:
    """k latents are eligible: for topk_encode, which can't return fewer.

    This waits for the device that holds the mask, so not while a CUDA graph is being captured.
    """
    if latent_mask is None or capturing(latent_mask):
        return
    eligible = int(latent_mask.sum())
    if k > eligible:
        raise ValueError(
            f"topk_encode: k must be between 1 and the number of eligible latents ({eligible}), got k={k}"
        )


def capturing(tensor: Tensor) -> bool:
    """Whether work on a tensor goes into a CUDA graph, to run later."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def check_leading(op: str, name: str, tensor: Tensor, indices: Tensor) -> None:
    """The leading (token) dimensions of a tensor are those of the indices."""
    if tensor.shape[:-1] != indices.shape[:-1]:
        raise ValueError(
            f"{op}: {name} and indices must agree in all but the last dimension, "
            f"got shapes {_shape(tensor)} and {_shape(indices)}"
        )


def check_code(op: str, values: Tensor, indices: Tensor) -> None:
    """Values and indices of one shape (..., k)."""
    check_float(op, "values", values)
    check_indices(op, indices)
    if values.shape != indices.shape:
        raise ValueError(
            f"{op}: values and indices must have one shape (..., k), "
            f"got {_shape(values)} and {_shape(indices)}"
        )


def is_plain_code(values: Tensor, indices: Tensor, weight: Tensor) -> bool:
    """Whether a code (N, k) and a weight (M, D) are valid beyond doubt, told from as little as can be.

    Beside a cold cache, which a gather from a large weight leaves behind, the checks of each argument on its
    own cost a tenth of decoding a thousand tokens.
    """
    return (
        isinstance(values, Tensor)
        and isinstance(indices, Tensor)
        and isinstance(weight, Tensor)
        and values.dim() == 2
        and weight.dim() == 2
        and values.shape == indices.shape
        and values.dtype is weight.dtype
        and values.dtype in DTYPES
        and indices.dtype is torch.int64
        and values.device == indices.device == weight.device
        and values.layout is indices.layout is weight.layout is torch.strided
        and not values.is_meta
    )


def check_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Two tensors on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {other_name} ({other.device}), got {tensor.device}"
        )


def check_alike(op: str, tensors: Sequence[tuple[str, Tensor | None]]) -> None:
    """All tensors share the first one's dtype and device; None is skipped."""
    first_name, first = tensors[0]
    for name, tensor in tensors[1:]:
        if tensor is None:
            continue
        check_device(op, name, tensor, first_name, first)
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"{op}: {name} must have the dtype of {first_name} ({str(first.dtype)[6:]}), "
                f"got {str(tensor.dtype)[6:]}"
            )
