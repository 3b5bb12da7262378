"""What the ops of gated recurrences have in common, whatever their cell: gradient and tangents.

They take ``u, *weights, *starts, cu_seqlens, solver`` and return ``*states, passes``. Ops of their gradients,
which start from inputs and states alone, take ``u, *weights, *starts, cu_seqlens, *states, *d_states``, and
whether gradients of u, of the weights and of the starts are needed. They return these, in that order; what
isn't needed is empty, of shape (0,).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastsparse._options import SOLVERS
from fastsparse.ops._library import accumulated, register
from fastsparse.ops.linear_recurrence import First, linear_recurrence
from fastsparse.reference._gated import Cell, apart, joined
from fastsparse.reference._precision import accumulate

SOURCE = "csrc/gated_ops.h"  # of all of them, and of their gradients


def register_gated(
    schema: str, form: str, *, cell: Cell, reference: Callable, backward: Callable
) -> Callable:
    """``register`` of a gated recurrence; ``backward`` runs the op of its gradient."""
    n = cell.states

    def setup_context(ctx, inputs, output) -> None:
        *kept, _ = inputs
        *states, passes = output
        ctx.mark_non_differentiable(passes)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *states)

    def back(ctx, *gradients):
        d_states, wanted = gradients[:n], ctx.needs_input_grad[:-2]
        if d_states[0] is None and d_states[-1] is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = wanted[0], any(wanted[1:-n]), any(wanted[-n:])
        found = backward(*ctx.saved_tensors, *d_states, *needs)
        return *(grad if needed else None for grad, needed in zip(found, wanted, strict=True)), None, None

    def jvp(inputs, output, tangents):
        """A linear recurrence of the derivatives of a step: in the state, and in what else enters it."""
        *inputs, cu_seqlens, _ = inputs
        inputs = [None if tensor is None else accumulate(tensor) for tensor in inputs]
        tangents = accumulated(tangents[: len(inputs)], like=inputs)
        states, starts = [accumulate(state) for state in output[:-1]], inputs[-n:]
        first = First(states[0], cu_seqlens, False)
        before = joined([first.before(*pair) for pair in zip(states, starts, strict=True)])
        given = before, *inputs[:-n]
        moved = cell.moved(*given, *tangents[:-n])
        start = _start(tangents[-n:])
        found = linear_recurrence(cell.jacobian(*given), moved, start, False, cu_seqlens)
        return *apart(cell, found.to(output[0].dtype)), None

    return register(
        schema,
        form,
        reference=reference,
        setup_context=setup_context,
        backward=back,
        jvp=jvp,
        options={"solver": SOLVERS},
        source=SOURCE,
    )


def _start(parts: list[Tensor | None]) -> Tensor | None:
    """A cell's state, zeros for parts that there aren't, if there is one."""
    some = next((part for part in parts if part is not None), None)
    return (
        None if some is None else joined([torch.zeros_like(some) if part is None else part for part in parts])
    )
