"""Pre-activations that nobody has computed: a tensor whose largest entries are those of ``topk_encode``."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from fastsparse.functional import TopK, topk_encode
from fastsparse.functional._tensors import autocast

__all__ = ["preactivations"]

MOST = 4  # of so many latents one: where more are wanted, a dense product is no slower


def preactivations(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``(x @ weight.T + bias) * scale``, or its ReLU: a tensor that is computed when it is read.

    Its ``topk`` along the last dimension is ``topk_encode``'s, also after ``torch.where(mask, it,
    -torch.inf)`` with a mask of latents, which is how dead latents are chosen for an auxiliary loss; a slice
    of its latents is such a tensor again.
    Everything else computes all of it, once. Gradients are those of the computed tensor in either case.

    Args:
        x: (..., D).
        weight: (M, D).
        bias: (M,).
        scale: (M,), none below 0.
        relu: whether all below 0 becomes 0.

    Returns:
        (..., M), of a subclass of Tensor.

    Raises:
        RuntimeError: when it is first read, where x, weight, bias or scale was changed in place before that.
        RuntimeError: by second derivatives of what has read all of it; those of its ``topk`` there are.

    Example:
        >>> import torch
        >>> from fastsparse.codes import preactivations
        >>> pre = preactivations(torch.eye(2, 3), torch.eye(3))
        >>> dead = torch.tensor([[False, True, True]])
        >>> torch.where(dead, pre, -torch.inf).topk(1).indices.tolist(), pre.sum().item()
        ([[1], [1]], 2.0)
    """
    sources = autocast(x, weight, bias, scale)
    return _Linear.apply(*sources, relu)


class Preactivations(Tensor):
    """To autograd an ordinary tensor; its data is computed where an operation asks for it."""

    @staticmethod
    def __new__(cls, sources: tuple[Tensor | None, ...], relu: bool, mask: Tensor | None = None):
        x, weight, *_ = sources
        size = *x.shape[:-1], weight.shape[0]
        return Tensor._make_wrapper_subclass(cls, size, dtype=x.dtype, device=x.device)

    def __init__(self, sources: tuple[Tensor | None, ...], relu: bool, mask: Tensor | None = None) -> None:
        self.sources, self.rectified, self.mask = sources, relu, mask
        self.versions = [_version(source) for source in sources]
        self.computed: Tensor | None = None
        self.known: TopK | None = None  # their largest entries, whose gradient nobody wants

    @classmethod
    def __torch_function__(cls, func: Callable, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if func in _REWRITTEN:
            found = _REWRITTEN[func](*args, **kwargs)
            if found is not NotImplemented:
                return found
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types, args=(), kwargs=None) -> Any:
        args, kwargs = tree_map(lambda v: v.read() if isinstance(v, cls) else v, (args, kwargs or {}))
        return func(*args, **kwargs)

    def read(self) -> Tensor:
        """All of it, without a place in the graph: that is this tensor's own."""
        if self.computed is None:
            self.check()
            with torch.no_grad():
                found = _compute(*self.sources, self.rectified)
                self.computed = found if self.mask is None else torch.where(self.mask, found, -torch.inf)
        return self.computed

    def check(self) -> None:
        """Raise where a source isn't what it was."""
        for name, source, version in zip(
            ("x", "weight", "bias", "scale"), self.sources, self.versions, strict=True
        ):
            if _version(source) != version:
                raise RuntimeError(
                    f"preactivations: {name} has been changed in place since these were made, and they were "
                    "not computed before"
                )


def _version(source: Tensor | None) -> int | None:
    return None if source is None or source.is_inference() else source._version


def _compute(x, weight, bias, scale, relu: bool) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # it is as it was when these were made
        found = F.linear(x, weight, bias)
        found = found if scale is None else found * scale
        return found.relu() if relu else found


class _Linear(torch.autograd.Function):
    """The node of all pre-activations, reached by the gradients of whatever has read them."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, relu):
        ctx.save_for_backward(x, weight, bias, scale)
        ctx.relu = relu
        ctx.set_materialize_grads(False)
        return Preactivations((x, weight, bias, scale), relu)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        wanted = ctx.needs_input_grad[:4]
        if grad is None:
            return (None,) * 5
        sources = [
            source if source is None else source.detach().requires_grad_(need)
            for source, need in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        with torch.enable_grad():
            found = _compute(*sources, ctx.relu)
        grads = iter(
            torch.autograd.grad(found, [s for s, need in zip(sources, wanted, strict=True) if need], grad)
        )
        return *(next(grads) if need else None for need in wanted), None


class _Masked(torch.autograd.Function):
    """Pre-activations of some latents, -inf the others."""

    @staticmethod
    def forward(ctx, pre, mask):
        ctx.save_for_backward(mask)
        masked = Preactivations(pre.sources, pre.rectified, mask)
        masked.versions = pre.versions
        return masked

    @staticmethod
    def backward(ctx, grad):
        return grad.masked_fill(~ctx.saved_tensors[0], 0), None


# What isn't computed.


def _wanted(pre: Preactivations) -> bool:
    """Whether all of them are there already, or their gradient has to be."""
    return pre.computed is not None or bool(pre._backward_hooks) or pre.retains_grad


def _where(condition, pre, other) -> Any:
    if (
        not isinstance(pre, Preactivations)
        or isinstance(other, Tensor)
        or other != -torch.inf
        or pre.mask is not None
        or _wanted(pre)
        or condition.dtype != torch.bool
        or condition.shape[-1:] != pre.shape[-1:]
        or condition.numel() != pre.shape[-1]
    ):
        return NotImplemented
    return _Masked.apply(pre, condition)


def _topk(pre, k, dim=-1, largest=True, sorted=True, *, out=None) -> Any:
    k, M = int(k), pre.shape[-1]
    if dim % pre.dim() != pre.dim() - 1 or not largest or out is not None or _wanted(pre):
        return NotImplemented
    if pre.known is not None and 1 <= k <= pre.known.indices.shape[-1]:
        return torch.return_types.topk(tuple(part[..., :k] for part in pre.known))
    mask = None if pre.mask is None else pre.mask.reshape(M)
    if not 1 <= k <= M // MOST or (mask is not None and int(mask.sum()) < k):
        return NotImplemented
    pre.check()
    x, weight, bias, scale = pre.sources
    with torch.autocast(x.device.type, enabled=False):
        activation = "relu" if pre.rectified else "none"
        values, indices = topk_encode(
            x, weight, bias, k=k, activation=activation, latent_scale=scale, latent_mask=mask
        )
        values = values if scale is None else values * scale[indices]
    return torch.return_types.topk((values, indices))


def _getitem(pre, index) -> Any:
    """The pre-activations of some neighbouring latents, for all tokens."""
    *rest, latents = index if isinstance(index, tuple) else (index,)
    whole = [part is Ellipsis or (isinstance(part, slice) and part == slice(None)) for part in rest]
    all_tokens = all(whole) and (Ellipsis in rest or len(rest) == pre.dim() - 1)
    if not all_tokens or not isinstance(latents, slice) or latents.step not in (None, 1):
        return NotImplemented
    if pre.mask is not None or _wanted(pre):
        return NotImplemented
    pre.check()
    x, *of_latents = pre.sources
    weight, bias, scale = (part if part is None else part[latents] for part in of_latents)
    with torch.autocast(x.device.type, enabled=False):
        return preactivations(x, weight, bias, scale=scale, relu=pre.rectified)


def _zeros_like(pre, **options) -> Any:
    options = {"dtype": pre.dtype, "device": pre.device} | options
    return NotImplemented if "memory_format" in options else torch.zeros(pre.shape, **options)


def _of_a_copy(function: Callable) -> Callable:
    return lambda pre, *args, **kwargs: function(pre.clone(), *args, **kwargs)


_REWRITTEN = {
    torch.where: _where, torch.topk: _topk, Tensor.topk: _topk, torch.zeros_like: _zeros_like,
    Tensor.__getitem__: _getitem,
}  # fmt: skip
# What asks for more than an operation could give: an ordinary tensor answers.
_REWRITTEN |= {
    function: _of_a_copy(function)
    for function in (
        Tensor.__array__, Tensor.__deepcopy__, Tensor.__reduce_ex__, Tensor.__repr__, Tensor.data_ptr,
        Tensor.numpy, Tensor.tolist, Tensor.untyped_storage,
    )
}  # fmt: skip
