"""Checks of tensor arguments; every message names the op, the argument, what it was and what it should be."""

import math
import operator
import os
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fastsparse._transforms import is_traced, unwrapped

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# How far from 1 the norm of an atom may be that is promised to be 1. Halves: rounding each of its entries
# moves it by half an eps at most. fp32: beyond what normalising and a step of training in fp32 leave. fp64:
# above the steps of torch.autograd.gradcheck.
UNIT_NORM_TOLERANCE = {
    torch.float32: 3e-4,
    torch.float64: 1e-5,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
}


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def named(value: object) -> str:
    """What was given in place of something else."""
    kind = type(value).__name__
    return kind if isinstance(value, (Tensor, tuple, list)) else f"{value!r} of type {kind}"


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
    shape = tensor.shape
    if len(shape) != 2:
        raise ValueError(f"{op}: {name} must have shape (M, D), got shape {_shape(tensor)}")
    return shape


def check_rows(op: str, name: str, tensor: Tensor, D: int) -> None:
    """Floating rows (..., D)."""
    check_float(op, name, tensor)
    shape = tensor.shape
    if len(shape) < 1 or shape[-1] != D:
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


def check_indices(op: str, indices: Tensor) -> Tensor:
    """Latent indices (..., k), which come back as int64. Kernels check their range: they read them anyway."""
    check_tensor(op, "indices", indices)
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: indices must be int64 or int32, got {str(indices.dtype)[6:]}")
    if indices.dim() < 1:
        raise ValueError(f"{op}: indices must have shape (..., k), got a scalar")
    return indices.long()


def check_range(op: str, indices: Tensor, M: int) -> None:
    """Every index is in [0, M): for the reference, since PyTorch's indexing would count -1 from the end.

    On the CPU only, since elsewhere it would wait for the device, except under FASTSPARSE_DEBUG=1; not while
    tracing, since it reads the data, nor while a CUDA graph is being captured.
    """
    if is_traced() or not _may_read(indices):
        return
    with torch._C._DisableFuncTorch():
        indices = unwrapped(indices)
        outside = (indices < 0) | (indices >= M)
        if outside.any():
            place = torch.nonzero(outside)[0].tolist()
            raise IndexError(f"{op}: indices{place} must be in [0, {M}), got {indices[tuple(place)].item()}")


def check_offsets(op: str, offsets: Tensor, indices: Tensor) -> None:
    """Offsets (N + 1,) bound the rows of a ragged code (E,): from 0 on, never back, and to its end.

    Behind the last row may be padding, of index 0. When this looks at data, see check_range.
    """
    if is_traced() or not _may_read(offsets):
        return
    with torch._C._DisableFuncTorch():
        bounds, indices = unwrapped(offsets), unwrapped(indices)
        starts, steps, ends = bounds[..., 0], bounds.diff(), bounds[..., -1:]
        if starts.any():
            raise ValueError(f"{op}: offsets must begin at 0, got {int(starts[starts != 0][0])}")
        if (steps < 0).any():
            *batch, at = (steps < 0).nonzero()[0].tolist()
            before, after = bounds[tuple(batch)][at : at + 2].tolist()
            raise ValueError(f"{op}: offsets must not decrease, got {after} after {before} at {at + 1}")
        entries = indices.shape[-1]
        behind, wrong = torch.arange(entries, device=ends.device) >= ends, ends > entries
        if 1 in (behind.dim(), indices.dim()) or behind.shape == indices.shape:  # else two vmaps batch them
            wrong = wrong | (behind & (indices != 0)).any(dim=-1, keepdim=True)
        if wrong.any():
            raise ValueError(
                f"{op}: offsets must end at the number of entries ({entries}), "
                f"got {int(ends.expand_as(wrong)[wrong][0])}; what lies behind is padding only where its "
                "indices are 0"
            )


def check_thresholds(op: str, threshold: Tensor) -> None:
    """No threshold is NaN, where a check may look at them (check_range)."""
    if is_traced() or not _may_read(threshold):
        return
    with torch._C._DisableFuncTorch():
        nan = unwrapped(threshold).isnan()
        if nan.any():
            raise ValueError(f"{op}: threshold must not be NaN, got it at {nan.nonzero()[0].tolist()}")


def check_eligible(
    op: str, name: str, chosen: int, latent_mask: Tensor | None, *, rows: int = 1, groups: int = 1
) -> None:
    """So many latents of every group, in so many rows, are eligible: for ops that can't return fewer.

    This waits for the device that holds the mask, so not while a CUDA graph is being captured.
    """
    if latent_mask is None or capturing(latent_mask):
        return
    if torch.compiler.is_compiling():  # which breaks the graph here
        eligible = int(latent_mask.view(groups, -1).sum(dim=1).amin())
    elif is_traced() or isinstance(latent_mask, FakeTensor):
        return
    else:
        with torch._C._DisableFuncTorch():
            counts = unwrapped(latent_mask).unflatten(-1, (groups, -1)).sum(dim=-1)
            eligible = min(counts.reshape(-1).tolist(), default=chosen)
    if chosen > rows * eligible:
        raise ValueError(
            f"{op}: {name} must be between 1 and {told_bound(rows, eligible, groups)}, got {name}={chosen}"
        )


def check_groups(op: str, weight: Tensor, groups: int) -> None:
    """So many groups of equally many latents."""
    M = weight.shape[0]
    if groups < 1 or M % groups:
        raise ValueError(
            f"{op}: groups must be at least 1 and divide the number of latents ({M}), got groups={groups}"
        )


def told_bound(rows: int, eligible: int, groups: int = 1) -> str:
    """How many latents can be chosen, in words."""
    if groups > 1:
        return f"the number of eligible latents of every group ({eligible})"
    latents = f"the number of eligible latents ({eligible})"
    return latents if rows == 1 else f"{latents} times that of tokens ({rows})"


def whole_number(op: str, name: str, number: int) -> int:
    """What PyTorch takes for an int: one of Python's or NumPy's, or a tensor of one; symbolic while tracing.

    A bool is none, a float neither.
    """
    if type(number) is int or isinstance(number, torch.SymInt):
        return number
    # Before its index is asked for: that of NumPy's True is 1, up to NumPy 2.2.
    boolean = isinstance(number, bool) or str(getattr(number, "dtype", None)) in ("bool", "torch.bool")
    try:
        whole = None if boolean else operator.index(number)
    except (TypeError, ValueError, RuntimeError):  # of tensors, by their dtype or their size
        whole = None
    if whole is None:
        raise TypeError(f"{op}: {name} must be an int, got {number!r} of type {type(number).__name__}")
    return whole


def check_count(op: str, name: str, count: int, least: int) -> int:
    """A whole number of at least so much; returns it."""
    count = whole_number(op, name, count)
    if count < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {name}={count}")
    return count


def check_flag(op: str, name: str, flag: bool) -> None:
    """True or False, and nothing that only passes for one."""
    if not isinstance(flag, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {flag!r} of type {type(flag).__name__}")


def check_tolerance(op: str, name: str, tolerance: float) -> None:
    """A finite number that isn't negative; symbolic while tracing."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be a float, got {tolerance!r} of type {type(tolerance).__name__}")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"{op}: {name} must be finite and at least 0, got {name}={tolerance}")


def check_positive(op: str, name: str, number: float) -> None:
    """A finite number above 0."""
    check_tolerance(op, name, number)
    if number == 0:
        raise ValueError(f"{op}: {name} must be above 0, got {name}={number}")


class UnitNormError(ValueError):
    """Atoms that were promised to have norm 1 have not: ``args`` are the op, and what was found."""

    def __str__(self) -> str:
        op, found = self.args
        return f"{op}: dictionary must have {found}; divide each atom by its norm, or leave normalized=False"


def check_unit_norm(op: str, dictionary: Tensor) -> None:
    """Every atom has norm 1, or 0, which is never chosen; NaN is left to surface in the result.

    One fast pass over a dictionary that matching pursuit reads k times and more. Like check_range on the CPU
    only, except under FASTSPARSE_DEBUG=1, and not while tracing or capturing.
    """
    if is_traced() or not _may_read(dictionary):
        return
    with torch._C._DisableFuncTorch():
        _check_norms(op, unwrapped(dictionary.detach()))


def _check_norms(op: str, dictionary: Tensor) -> None:
    wide = torch.promote_types(dictionary.dtype, torch.float32)
    norms = torch.linalg.vector_norm(dictionary.to(wide), dim=-1).flatten()
    tolerance = UNIT_NORM_TOLERANCE[dictionary.dtype]
    off = (norms - 1).abs().masked_fill_(norms == 0, 0).nan_to_num_(nan=0.0)
    if off.numel() == 0 or off.max() <= tolerance:
        return
    if off.max() > _tolerance_as_rounded(dictionary.flatten(0, -2)[off > tolerance]):
        worst = int(off.argmax())
        raise UnitNormError(
            op,
            f"atoms of norm 1 (to {tolerance:g}), got norm {norms[worst].item():g} "
            f"at atom {worst % dictionary.shape[-2]}",
        )


def _tolerance_as_rounded(atoms: Tensor) -> float:
    """The tolerance of the coarsest dtype that holds all of the atoms exactly: what they were rounded to.

    Moving atoms to a finer dtype changes neither them nor their codes: c = w @ r is taken whatever the norm,
    and the residual and the gradient are those of that c. Where a norm is off by e, a step explains less than
    with the best c by a share of (2 e)^2: as much less as in the dtype that the atoms come from.
    """
    return max(
        tolerance
        for dtype, tolerance in UNIT_NORM_TOLERANCE.items()
        if torch.equal(atoms.to(dtype).to(atoms.dtype), atoms)
    )


def check_gram(op: str, dictionary: Tensor) -> None:
    """The Gram matrix of the atoms, in the type that sums are carried in, fits into the free memory."""
    if torch.compiler.is_compiling():
        return
    M = dictionary.shape[0]
    needed = M * M * (8 if dictionary.dtype == torch.float64 else 4)
    available = _free_memory(dictionary.device)
    if available is not None and needed > available:
        raise ValueError(
            f"{op}: the Gram matrix of method='gram' must fit into the {available / 2**30:.2f} GiB that are "
            f"free on {dictionary.device}, got one of {needed / 2**30:.2f} GiB, for M = {M} atoms; "
            "method='direct' needs none"
        )


def _free_memory(device: torch.device) -> int | None:
    """Bytes, None where it can't be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def _may_read(tensor: Tensor) -> bool:
    """Whether a check may look at a tensor's data: elsewhere than on the CPU it would wait for the device."""
    if isinstance(tensor, FakeTensor):
        return False
    if tensor.device.type == "cpu":
        return True
    return os.environ.get("FASTSPARSE_DEBUG") == "1" and not capturing(tensor)


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


def check_code(op: str, values: Tensor, indices: Tensor) -> Tensor:
    """Values and indices of one shape (..., k); returns the indices as int64."""
    check_float(op, "values", values)
    indices = check_indices(op, indices)
    if values.shape != indices.shape:
        raise ValueError(
            f"{op}: values and indices must have one shape (..., k), "
            f"got {_shape(values)} and {_shape(indices)}"
        )
    return indices


def check_ragged(op: str, indices: Tensor, offsets: Tensor, x: Tensor | None = None) -> None:
    """Indices (E,) and offsets (N + 1,) of a ragged code, for the tokens (..., D) that there are N of."""
    if indices.dim() != 1:
        raise ValueError(
            f"{op}: indices must have shape (E,) where offsets are given, got shape {_shape(indices)}"
        )
    check_tensor(op, "offsets", offsets)
    if offsets.dtype != torch.int64:
        raise TypeError(f"{op}: offsets must be int64, got {str(offsets.dtype)[6:]}")
    rows = None if x is None else x.shape[:-1].numel()
    if offsets.dim() != 1 or offsets.shape[0] == 0 or rows not in (None, offsets.shape[0] - 1):
        wanted = "(N + 1,)" if rows is None else f"(N + 1,) = ({rows + 1},)"
        raise ValueError(f"{op}: offsets must have shape {wanted}, got shape {_shape(offsets)}")
    check_device(op, "offsets", offsets, "indices", indices)


def are_plain(indices: Tensor, first: Tensor, second: Tensor) -> bool:
    """Whether indices (N, k) and two matrices are valid beyond doubt, but for shapes, told from little.

    Beside a cold cache, which a gather from a large weight leaves behind, the checks of each argument on its
    own cost a tenth of decoding a thousand tokens.
    """
    return (
        isinstance(indices, Tensor)
        and isinstance(first, Tensor)
        and isinstance(second, Tensor)
        and indices.dim() == first.dim() == second.dim() == 2
        and first.dtype is second.dtype
        and first.dtype in DTYPES
        and indices.dtype is torch.int64
        and indices.device == first.device == second.device
        and indices.layout is first.layout is second.layout is torch.strided
        and not indices.is_meta
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
    dtype, device = first.dtype, first.device
    for name, tensor in tensors[1:]:
        if tensor is None:
            continue
        if tensor.device != device:
            check_device(op, name, tensor, first_name, first)
        if tensor.dtype != dtype:
            raise ValueError(
                f"{op}: {name} must have the dtype of {first_name} ({str(dtype)[6:]}), "
                f"got {str(tensor.dtype)[6:]}"
            )


def _fits(got: torch.Size, shape: Sequence[int | None]) -> bool:
    if got == shape:
        return True
    if len(got) != len(shape):
        return False
    for size, want in zip(got, shape, strict=True):  # noqa: SIM110 - all() would cost as much as the rest
        if want is not None and size != want:
            return False
    return True


def check_shape(op: str, name: str, tensor: Tensor, form: str, shape: Sequence[int | None]) -> None:
    """A floating tensor whose shape is written as ``form``; None for sizes that are free."""
    check_float(op, name, tensor)
    if not _fits(tensor.shape, shape):
        wanted = form if None in shape else f"{form} = {tuple(shape)}"
        raise ValueError(f"{op}: {name} must have shape {wanted}, got shape {_shape(tensor)}")


def check_cu_seqlens(op: str, cu_seqlens: Tensor, name: str, packed: Tensor) -> None:
    """Bounds of sequences that lie end to end in a tensor (1, T, ...): from 0 to T, and never back.

    Their values are read on the CPU, elsewhere under FASTSPARSE_DEBUG=1 only; not while tracing or capturing.
    """
    check_tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cu_seqlens must be int32 or int64, got {str(cu_seqlens.dtype)[6:]}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"{op}: cu_seqlens must have shape (S + 1,) for S sequences, got shape {_shape(cu_seqlens)}"
        )
    check_device(op, "cu_seqlens", cu_seqlens, name, packed)
    if packed.shape[0] != 1:
        raise ValueError(
            f"{op}: {name} must have B = 1 with cu_seqlens, its sequences one after the other, "
            f"got shape {_shape(packed)}"
        )
    if is_traced() or not _may_read(cu_seqlens):
        return
    with torch._C._DisableFuncTorch():
        rows = unwrapped(cu_seqlens).reshape(-1, cu_seqlens.shape[0]).tolist()
    for bounds in rows:
        _check_bounds(op, bounds, packed.shape[1])


def _check_bounds(op: str, bounds: list[int], T: int) -> None:
    if bounds[0] != 0 or bounds[-1] != T:
        raise ValueError(
            f"{op}: cu_seqlens must go from 0 to T = {T}, got one from {bounds[0]} to {bounds[-1]}"
        )
    for s, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(f"{op}: cu_seqlens must not decrease, got {end} after {start} at {s + 1}")
