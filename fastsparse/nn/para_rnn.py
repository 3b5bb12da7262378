"""What ParaGRU and ParaLSTM share: layers of an input product and a recurrence that doesn't mix channels."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastsparse._options import SOLVERS, position_of
from fastsparse._validation import (
    check_alike,
    check_count,
    check_cu_seqlens,
    check_flag,
    check_float,
    check_shape,
    check_tolerance,
)
from fastsparse.functional._linear import linear
from fastsparse.functional._tensors import autocast


class ParaRNN(nn.Module, ABC):
    """Layers, each a product of its inputs with three gates' weights, and a recurrence along time.

    A layer's states are (B, H) tensors, as many as ``states`` says; a subclass runs their recurrence. The
    gates of one another's channels meet in the products alone.
    """

    states: int
    recurrent: ClassVar[dict[str, int]]  # names of the recurrent weights, and how many rows they have
    recurrent_of_ml_pararnn: ClassVar[dict[str, str]] = {"weight_hh": "A", "peephole": "C"}
    gates: tuple[str, str, str]  # what the rows of u are, by pararnn-torch's letters, and in its own order
    order: tuple[str, str, str]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        num_heads: int = 1,
        solver: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        input_size = check_count(name, "input_size", input_size, 1)
        hidden_size = check_count(name, "hidden_size", hidden_size, 1)
        num_layers = check_count(name, "num_layers", num_layers, 1)
        num_heads = check_count(name, "num_heads", num_heads, 1)
        if input_size % num_heads or hidden_size % num_heads:
            raise ValueError(
                f"{name}: num_heads must divide input_size and hidden_size ({input_size} and {hidden_size}), "
                f"got num_heads={num_heads}"
            )
        check_flag(name, "bias", bias)
        check_flag(name, "batch_first", batch_first)
        check_tolerance(name, "dropout", dropout)
        if dropout > 1:
            raise ValueError(f"{name}: dropout must be in [0, 1], got {dropout}")
        position_of(name, "solver", solver, SOLVERS)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, dropout
        self.num_heads, self.solver = num_heads, solver
        for layer in range(num_layers):
            inputs = hidden_size if layer else input_size
            shapes = {"weight_ih": (3, hidden_size, inputs // num_heads)}
            shapes |= {part: (rows, hidden_size) for part, rows in self.recurrent.items()}
            shapes |= {"bias": (3, hidden_size)} if bias else {}
            for part, shape in shapes.items():
                self.register_parameter(
                    f"{part}_l{layer}", nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                )
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, as ml-pararnn does unless told otherwise.

        Recurrent ones are normal of deviation 2 / sqrt(5 H); input weights uniform within
        sqrt(6 / (fan_in + fan_out)), of one head (Glorot & Bengio 2010); biases 0, but for the first gate's,
        which go from 0 to -1 along the channels, so that they forget at different rates.
        """
        for name, parameter in self.named_parameters():
            if name.startswith("bias"):
                parameter.zero_()
                parameter[0] = torch.linspace(0, -1, self.hidden_size, device=parameter.device)
            elif name.startswith("weight_ih"):
                bound = (6 / (parameter.shape[-1] + self.hidden_size // self.num_heads)) ** 0.5
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.normal_(0, 2 / (5 * self.hidden_size) ** 0.5, generator=generator)

    def forward(self, x, state=None, *, cu_seqlens: Tensor | None = None):
        """Run all layers over whole sequences.

        Args:
            x: (B, T, D), or (T, B, D) with ``batch_first=False``, of the weights' dtype. Under autocast, its
                dtype is what everything is brought to, and what comes out.
            state: of each layer before the first step, (num_layers, B, H); zeros if None. An LSTM's is a pair
                of these, (h, c).
            cu_seqlens: (S + 1,), for S sequences of different lengths one after the other in B = 1; see
                :func:`fastsparse.linear_recurrence`. States are then (num_layers, S, H).

        Returns:
            ``(output, state)``: the last layer's h, (B, T, H), laid out as x is, and of each layer the state
            after the last step, in the form of ``state``.

        Raises:
            TypeError, ValueError: x or state have another shape or dtype than they should, or cu_seqlens
                don't go from 0 to T.
        """
        name = type(self).__name__
        if isinstance(x, PackedSequence):
            raise TypeError(f"{name}: x must be a torch.Tensor; sequences of many lengths go by cu_seqlens")
        check_float(name, "x", x)
        if x.dim() != 3 or x.shape[-1] != self.input_size:
            form = "(B, T, D)" if self.batch_first else "(T, B, D)"
            raise ValueError(
                f"{name}: x must have shape {form} with D = {self.input_size}, got shape {tuple(x.shape)}"
            )
        h = x if self.batch_first else x.transpose(0, 1)
        if cu_seqlens is not None:
            check_cu_seqlens(name, cu_seqlens, "x" if self.batch_first else "x.transpose(0, 1)", h)
        S = h.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        starts, weight = self._unpacked(state, S), self.weight_ih_l0
        if torch._C._is_any_autocast_enabled():
            h, weight, *starts = autocast(h, weight[:0], *starts)
        check_alike(name, (("weight_ih_l0", weight), ("x", h), *[("state", part) for part in starts]))
        ends = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                h = F.dropout(h, self.dropout)
            start = [part[layer] for part in starts] or None
            found = self._recur(self._gates(h, layer), layer, start, cu_seqlens)
            ends.append(_last(found, start, S, cu_seqlens))
            h = found[0]
        final = tuple([torch.stack(parts) for parts in zip(*ends, strict=True)])
        return h if self.batch_first else h.transpose(0, 1), final if self.states > 1 else final[0]

    def step(self, x, state=None):
        """Take one step, for decoding.

        Args:
            x: (B, D).
            state: as :meth:`forward` takes and returns it.

        Returns:
            ``(output, state)``: (B, H), and the state after it.

        Raises:
            TypeError, ValueError: x or state have another shape or dtype than they should.
        """
        check_shape(
            type(self).__name__, "x", x, f"(B, D) with D = {self.input_size}", (None, self.input_size)
        )
        time = 1 if self.batch_first else 0
        output, state = self(x.unsqueeze(time), state)
        return output.squeeze(time), state

    def _gates(self, x: Tensor, layer: int) -> Tensor:
        """u (B, T, 3, H): the inputs' share of the gates, each channel's of its own head's inputs."""
        weight = getattr(self, f"weight_ih_l{layer}")
        bias = getattr(self, f"bias_l{layer}") if self.bias else None
        if self.num_heads == 1:
            flat = None if bias is None else bias.flatten()
            return linear(x, weight.flatten(0, 1), flat).view(*x.shape[:2], 3, self.hidden_size)
        heads = x.unflatten(-1, (self.num_heads, -1))
        blocks = weight.unflatten(1, (self.num_heads, -1))  # (3, heads, H / heads, D / heads)
        u = torch.einsum("btnd,gnhd->btgnh", heads, blocks).flatten(-2)
        return u if bias is None else u + bias

    def _weights(self, layer: int) -> list[Tensor]:
        return [getattr(self, f"{name}_l{layer}") for name in self.recurrent]

    @abstractmethod
    def _recur(self, u: Tensor, layer: int, start: list[Tensor] | None, cu_seqlens: Tensor | None):
        """The states along time, h first, each (B, T, H)."""

    def _unpacked(self, state, S: int) -> tuple[Tensor, ...]:
        """The parts of a state, each (num_layers, S, H); none of None."""
        if state is None:
            return ()
        name, shape = type(self).__name__, (self.num_layers, S, self.hidden_size)
        if self.states > 1 and (not isinstance(state, (tuple, list)) or len(state) != self.states):
            got = f"{len(state)} of them" if isinstance(state, (tuple, list)) else type(state).__name__
            raise TypeError(f"{name}: state must be a pair (h, c), got {got}")
        parts = tuple(state) if self.states > 1 else (state,)
        for part in parts:
            check_float(name, "state", part)
            if part.shape != shape:
                raise ValueError(
                    f"{name}: state must have shape (num_layers, B, H) = {shape}, "
                    f"got shape {tuple(part.shape)}"
                )
        return parts

    @classmethod
    def from_ml_pararnn(cls, *state_dicts: Mapping[str, Tensor], **options):
        """A module with the weights of cells that ml-pararnn has trained.

        Args:
            state_dicts: one for each layer, of a ``GRUDiagMH`` for a ParaGRU, of an ``LSTMCIFGDiagMH`` for a
                ParaLSTM, with the nonlinearities that they have by default.
            options: ``batch_first``, ``dropout``, ``solver``, ``device``, ``dtype``; the last two are
                those of the weights if not given.

        Returns:
            The module, which computes the same.

        Raises:
            TypeError: something else than dicts of floating tensors was given.
            ValueError: there is no cell, names are not those of such cells, or cells don't fit together.

        Source: https://github.com/apple/ml-pararnn
        """
        op = f"{cls.__name__}.from_ml_pararnn"
        rows = {cls.recurrent_of_ml_pararnn[name]: rows for name, rows in cls.recurrent.items()}
        for state_dict in state_dicts or ({},):
            if not isinstance(state_dict, Mapping):
                raise TypeError(
                    f"{op}: state_dicts must be dicts of tensors, one for each layer, "
                    f"got {type(state_dict).__name__}"
                )
            if set(state_dict) != (wanted := {"B", "b", *rows}):
                raise ValueError(
                    f"{op}: each state_dict must hold {', '.join(sorted(wanted))}, "
                    f"got {', '.join(sorted(state_dict)) or 'nothing'}"
                )
        first = state_dicts[0]["B"]
        check_shape(op, "B", first, "(heads, D / heads, 3, H / heads)", (None, None, 3, None))
        heads, inputs, _, outputs = first.shape
        for layer, state_dict in enumerate(state_dicts):
            shape = heads, outputs if layer else inputs, 3, outputs
            check_shape(op, f"B of layer {layer}", state_dict["B"], "(heads, ., 3, H / heads)", shape)
            for name, count in {"b": 3, **rows}.items():
                shape = count, heads * outputs
                check_shape(op, f"{name} of layer {layer}", state_dict[name], f"({count}, H)", shape)
        options = {"dtype": first.dtype, "device": first.device} | options
        module = cls(heads * inputs, heads * outputs, len(state_dicts), num_heads=heads, **options)
        loaded = {}
        for layer, state_dict in enumerate(state_dicts):
            loaded[f"weight_ih_l{layer}"] = state_dict["B"].permute(2, 0, 3, 1).flatten(1, 2)
            loaded[f"bias_l{layer}"] = state_dict["b"]
            for name in cls.recurrent:
                loaded[f"{name}_l{layer}"] = state_dict[cls.recurrent_of_ml_pararnn[name]]
        module.load_state_dict(loaded)
        return module

    @classmethod
    def from_pararnn_torch(
        cls, state_dict: Mapping[str, Tensor], *, max_recurrent_norm: float | None = 0.5, **options
    ):
        """A module with the weights of one that the package pararnn-torch has trained.

        Args:
            state_dict: of its cell of the same name, or of a ``ParaRNN`` of such cells; ``mix='head'``, which
                mixes channels in time, has no counterpart here.
            max_recurrent_norm: that of the cell, which clamps its recurrent weights to within it as it runs;
                here they are clamped once, now. None for a cell that doesn't.
            options: ``batch_first``, ``dropout``, ``solver``, ``device``, ``dtype``; the last two are
                those of the weights if not given.

        Returns:
            The module, which computes the same.

        Raises:
            TypeError: something else than a dict of floating tensors was given.
            ValueError: the names are not those of such cells, cells don't fit together, or the norm is
                negative.
        """
        op = f"{cls.__name__}.from_pararnn_torch"
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"{op}: state_dict must be a dict of tensors, got {type(state_dict).__name__}")
        if max_recurrent_norm is not None:
            check_tolerance(op, "max_recurrent_norm", max_recurrent_norm)
        prefixes = [""] if "W_x.weight" in state_dict else []
        while f"layers.{len(prefixes)}.W_x.weight" in state_dict:
            prefixes.append(f"layers.{len(prefixes)}.")
        letters = [f"a_{letter}" for letter in cls.gates], [f"c_{letter}" for letter in cls.gates[:2]]
        sources = dict(zip(cls.recurrent, letters, strict=False))
        wanted = {"W_x.weight", "W_x.bias"}.union(*sources.values())
        known = {prefix + name for prefix in prefixes for name in wanted}
        if not known or known != set(state_dict):
            raise ValueError(
                f"{op}: state_dict must hold {', '.join(sorted(wanted))}, or "
                f"these of layers.0, layers.1, ..., got {', '.join(sorted(state_dict)) or 'nothing'}"
            )
        first = state_dict[f"{prefixes[0]}W_x.weight"]
        check_shape(op, f"{prefixes[0]}W_x.weight", first, "(3 H, D)", (None, None))
        inputs, H = first.shape[1], first.shape[0] // 3
        for layer, prefix in enumerate(prefixes):
            check_shape(
                op,
                f"{prefix}W_x.weight",
                state_dict[f"{prefix}W_x.weight"],
                "(3 H, D)",
                (3 * H, H if layer else inputs),
            )
            check_shape(op, f"{prefix}W_x.bias", state_dict[f"{prefix}W_x.bias"], "(3 H,)", (3 * H,))
            for name in (name for names in sources.values() for name in names):
                check_shape(op, prefix + name, state_dict[prefix + name], "(H,)", (H,))
        options = {"dtype": first.dtype, "device": first.device} | options
        module = cls(inputs, H, len(prefixes), **options)
        rows = [cls.order.index(letter) for letter in cls.gates]
        loaded = {}
        for layer, prefix in enumerate(prefixes):
            weight, bias = (state_dict[f"{prefix}W_x.{part}"] for part in ("weight", "bias"))
            loaded[f"weight_ih_l{layer}"] = weight.unflatten(0, (3, -1))[rows]
            loaded[f"bias_l{layer}"] = bias.unflatten(0, (3, -1))[rows]
            for name, parts in sources.items():
                values = torch.stack([state_dict[prefix + part] for part in parts])
                cap = max_recurrent_norm
                loaded[f"{name}_l{layer}"] = values if cap is None else values.clamp(-cap, cap)
        module.load_state_dict(loaded)
        return module

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, bias={self.bias}, "
            f"batch_first={self.batch_first}, dropout={self.dropout}, num_heads={self.num_heads}, "
            f"solver={self.solver!r}"
        )


def _last(
    states: Sequence[Tensor], start: list[Tensor] | None, S: int, cu_seqlens: Tensor | None
) -> list[Tensor]:
    """Parts (S, H) of the state after each sequence's last step; the one it started from if it has none."""
    if cu_seqlens is None and states[0].shape[1]:
        return [part[:, -1] for part in states]
    before = start or [states[0].new_zeros(S, states[0].shape[-1])] * len(states)
    if states[0].shape[1] == 0:
        return before
    some, last = (cu_seqlens.diff() > 0).unsqueeze(-1), (cu_seqlens[1:] - 1).clamp_min(0)
    return [torch.where(some, part[0, last], first) for part, first in zip(states, before, strict=True)]
