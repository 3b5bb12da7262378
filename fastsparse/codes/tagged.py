"""Dense activations that carry the sparse code that they were made of."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from fastsparse._validation import check_count, named
from fastsparse.functional import BatchTopK, Ragged, TopK, sddmm, sparse_decode, spmm_t
from fastsparse.functional._tensors import autocast

__all__ = [
    "code_of", "codes_to_dense", "decode_from_dense", "decode_tagged", "fired", "tag", "why_untagged",
]  # fmt: skip


class _Tag(NamedTuple):
    code: TopK | Ragged  # TopK of values (N, k)
    version: int  # of the dense tensor, when it was as the code says


# Beside the tensors, not in them: so a copy, a pickle or a view of one is an ordinary tensor.
_TAGS = WeakTensorKeyDictionary()


def codes_to_dense(
    code: TopK | Ragged | BatchTopK, num_latents: int, *, leading: Sequence[int] | None = None
) -> Tensor:
    """Make a code dense, in a tensor that remembers the code.

    It is an ordinary tensor: what reads or changes it gets what it would from any other.
    :func:`decode_from_dense` and :func:`code_of` know its code for as long as it is unchanged.

    Args:
        code: of :class:`TopK` values (..., k), or (E,) in rows.
        num_latents: M.
        leading: dimensions that N rows make up; default: those of the values, or N.

    Returns:
        (..., M), or (N, M) of a code in rows; entries of one place are added. Gradients reach the values.

    Raises:
        TypeError: ``code`` is none, or num_latents is not an int.
        ValueError: num_latents is negative.
        IndexError, RuntimeError: an index lies outside [0, M).

    Example:
        >>> import torch, fastsparse
        >>> from fastsparse.codes import codes_to_dense, decode_from_dense
        >>> acts = codes_to_dense(fastsparse.topk_encode(torch.eye(2, 3), torch.eye(3), k=1), 3)
        >>> acts.tolist(), decode_from_dense(acts, torch.eye(3)).tolist()
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    """
    M, code = check_count("codes_to_dense", "num_latents", num_latents, 0), _plain("codes_to_dense", code)
    values = code.values
    # In place on new zeros: no second tensor of this size.
    if isinstance(code, TopK):
        dense = values.new_zeros(*values.shape[:-1], M).scatter_add_(-1, code.indices, values)
    else:
        dense = values.new_zeros(code.offsets.shape[0], M)  # a row for the padding
        dense = dense.index_put_((code.rows(), code.indices), values, accumulate=True)[:-1]
    return tag(dense if leading is None else dense.reshape(*leading, M), code)


def tag(tensor: Tensor, code: TopK | Ragged) -> Tensor:
    """Let a tensor (..., M), dense or of layout COO, carry the code that it was made of; returns it."""
    # Else nobody could tell whether it is changed, or by whom its gradient is wanted.
    if not tensor.is_inference() and not torch._C._are_functorch_transforms_active():
        _TAGS[tensor] = _Tag(code, tensor._version)
    return tensor


def why_untagged(dense: Tensor) -> str | None:
    """Why the code that a dense tensor was made of doesn't stand for it; None where it does."""
    tag = _TAGS.get(dense)
    if tag is None:
        return "not made of a code"
    if dense._version != tag.version:
        return "changed in place"
    if dense._backward_hooks:
        return "a hook wants its gradient"
    if dense.retains_grad or (dense.requires_grad and dense.is_leaf):
        return "it retains its gradient"
    return None


def code_of(dense: Tensor) -> TopK | Ragged | None:
    """The code of a tensor that :func:`codes_to_dense` made, as long as it stands for it.

    It doesn't where the tensor was changed in place, or where a hook, ``retain_grad`` or ``requires_grad_``
    wants the gradient that flows through it. Changes through ``.data`` can't be seen, as autograd doesn't see
    them either. Under ``torch.inference_mode`` nothing tells of changes: there no code is remembered.
    """
    return None if why_untagged(dense) else _TAGS[dense].code


def decode_from_dense(dense: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``dense @ weight + bias``, by the code where the tensor still stands for one.

    Args:
        dense: (..., M).
        weight: (M, D).
        bias: (D,).

    Returns:
        (..., D). Gradients reach the code's values; the dense tensor only where someone wants its own: a
        hook, ``retain_grad``, ``torch.autograd.grad(out, dense)``.
    """
    code = code_of(dense)
    if code is None or dense.shape[-1] != weight.shape[0]:  # whose error says so
        decoded = dense @ weight
        return decoded if bias is None else decoded + bias
    return decode_tagged(dense, code, weight, bias)


def decode_tagged(
    dense: Tensor,
    code: TopK | Ragged,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norms: Tensor | None = None,
) -> Tensor:
    """As :func:`decode_from_dense`, by a code that the caller knows to stand for the dense tensor.

    With ``norms`` (M,), those of the rows of ``weight``, the dense tensor is the code times the norms, and
    what is decoded the dense tensor divided by them: they cancel, in values and gradients.
    """
    values, indices, *offsets = code
    values, weight, bias = autocast(values, weight, bias)
    source = None if dense.is_sparse else dense
    decoded = _Decode.apply(source, values, weight, bias, indices, offsets[0] if offsets else None, norms)
    return decoded.reshape(*dense.shape[:-1], weight.shape[1])


class _Decode(torch.autograd.Function):
    """Decodes a code. Its backward finds out whose gradients are wanted: the code's or the dense tensor's."""

    @staticmethod
    def forward(ctx, dense, values, weight, bias, indices, offsets, norms):
        ctx.save_for_backward(values, weight, indices, offsets, norms)
        if dense is not None:
            ctx.dense, ctx.size = TensorWeakRef(dense), dense.shape
            ctx.nodes = dense.grad_fn, values.grad_fn
        return sparse_decode(values, indices, weight, bias, offsets)

    @staticmethod
    def backward(ctx, grad):
        values, weight, indices, offsets, norms = ctx.saved_tensors
        needs_dense, needs_values, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        d_dense = d_values = d_weight = d_bias = None
        if needs_weight:
            d_weight = spmm_t(values, indices, grad, weight.shape[0], offsets)
        if needs_dense and _is_wanted(ctx.dense(), *ctx.nodes):
            d_dense = (grad @ weight.T).reshape(ctx.size)
            if norms is not None:
                d_dense = d_dense / norms
                if needs_weight:
                    d_weight = d_weight - _of_norms(grad, values, weight, indices, offsets, norms)
        elif needs_values:
            d_values = sddmm(grad, weight, indices, offsets)
        if needs_bias:
            d_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return d_dense, d_values, d_weight, d_bias, None, None, None


def _of_norms(grad, values, weight, indices, offsets, norms) -> Tensor:
    """What the gradient of the dense tensor brings to the weight by its norms, and dividing by them takes."""
    entries = values * sddmm(grad, weight, indices, offsets)
    by_latent = spmm_t(entries, indices, grad.new_ones(*grad.shape[:-1], 1), weight.shape[0], offsets)
    return by_latent * weight / norms.square().unsqueeze(1)


def _is_wanted(dense: Tensor | None, dense_node, values_node) -> bool:
    """Whether the gradient of a dense tensor itself is wanted, and not only that of what it was made of."""
    if dense is not None and (dense._backward_hooks or dense.retains_grad):
        return True
    if values_node is None:  # a leaf, of which nobody may ask
        return False
    runs = torch._C._will_engine_execute_node
    return runs(dense_node) and not runs(values_node)  # torch.autograd.grad(out, dense)


def fired(code: TopK | Ragged | BatchTopK | Tensor, num_latents: int) -> Tensor:
    """(M,) bool with M = num_latents: which latents are above 0 for a token, of a code or dense (..., M)."""
    M = check_count("fired", "num_latents", num_latents, 0)
    if isinstance(code, Tensor):
        found = code_of(code)
        if found is None:
            return (code > 0).reshape(-1, M).any(0)
        code = found
    code = _plain("fired", code)
    above = (code.values > 0).reshape(-1)
    counts = torch.zeros(M, dtype=torch.int64, device=above.device)
    return counts.scatter_add_(0, code.indices.reshape(-1), above.to(torch.int64)) > 0


def _plain(op: str, code: TopK | Ragged | BatchTopK) -> TopK | Ragged:
    if isinstance(code, BatchTopK):
        return code.code
    if not isinstance(code, TopK | Ragged):
        raise TypeError(f"{op}: code must be a TopK, Ragged or BatchTopK, got {named(code)}")
    return code
