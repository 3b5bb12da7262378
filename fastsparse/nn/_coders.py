"""Encoders beside decoders of another width, of which the models are made that reconstruct something else."""

from collections.abc import Callable, Collection
from inspect import Parameter, Signature, signature
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastsparse._options import position_of
from fastsparse._validation import check_rows
from fastsparse.nn._atoms import normalize_
from fastsparse.nn._linear_encoder import LinearEncoder
from fastsparse.nn.batch_topk_sae import BatchTopKSAE
from fastsparse.nn.jump_relu_sae import JumpReLUSAE
from fastsparse.nn.topk_sae import TopKSAE

_SMALL = 0.1  # the norm of atoms at first that need not keep it: outputs begin near b_dec
_SIZES = {"d_model", "num_latents", "k", "device", "dtype", "generator"}  # said by place, or the same for all


class _Coder(LinearEncoder):
    """An encoder of the kind that stands next in a class's bases, for tokens of one width, to another.

    Args:
        owner: whose it is, for messages.
        d_in, d_out: the widths.
        centred: whether ``b_dec`` is taken from what is encoded, as in an autoencoder.
        parts: of how many equal parts, one after the other, an atom is made, whose norms add up to its own.
        sizes, options: of the kind.
    """

    def __init__(
        self,
        owner: str,
        d_in: int,
        d_out: int,
        *sizes: Any,
        centred: bool = False,
        parts: int = 1,
        **options: Any,
    ) -> None:
        self._owner, self._d_out, self._centred, self._parts = owner, d_out, centred, parts
        super().__init__(d_in, *sizes, **options)

    @property
    def _name(self) -> str:
        return self._owner

    def _center(self, x: Tensor) -> Tensor:
        if self._centred:
            return super()._center(x)
        check_rows(self._name, "x", x, self.d_model)
        return x

    def _start_encoder(self, generator: torch.Generator | None) -> None:
        """By directions of its own where atoms are none of its inputs'."""
        if self._centred:
            super()._start_encoder(generator)
            return
        self.W_enc.normal_(generator=generator)
        normalize_(self.W_enc)
        if self.polynomial is None and not self.unit_norm:
            self.W_dec.mul_(_SMALL)

    def _norms(self) -> Tensor:
        """(M,) of the atoms; of several parts the sum of theirs.

        Source: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing".
        """
        atoms = self._widened(self._atoms()).unflatten(1, (self._parts, -1))
        return torch.linalg.vector_norm(atoms, dim=2).sum(dim=1)


class _TopK(_Coder, TopKSAE):
    pass


class _BatchTopK(_Coder, BatchTopKSAE):
    pass


class _JumpReLU(_Coder, JumpReLUSAE):
    pass


_CODERS = {"topk": _TopK, "batchtopk": _BatchTopK, "jumprelu": _JumpReLU}
ENCODERS = {"topk": TopKSAE, "batchtopk": BatchTopKSAE, "jumprelu": JumpReLUSAE}


def made_coder(
    owner: str, encoder: str, widths: tuple[int, int], num_latents: int, k: float | None, **options: Any
) -> LinearEncoder:
    """One of a kind, with the options of that kind; those of other kinds must be as by default.

    Raises:
        ValueError: the kind is unknown, or hasn't an option.
    """
    position_of(owner, "encoder", encoder, tuple(ENCODERS))
    known, shared = signature(ENCODERS[encoder]).parameters, _options(ENCODERS)
    for name, value in list(options.items()):
        if name in shared and (tuple(value) if isinstance(value, list) else value) == shared[name].default:
            del options[name]  # as by default: the kind has its own
        elif name in shared and name not in known:
            raise ValueError(f"{owner}: {name} must be left out with encoder={encoder!r}, got {value!r}")
    if ("k" in known) != (k is not None):
        wanted = "given" if "k" in known else "left out"
        raise ValueError(f"{owner}: k must be {wanted} with encoder={encoder!r}, got {k}")
    if encoder == "topk" and isinstance(k, float) and k.is_integer():
        k = int(k)
    return _CODERS[encoder](owner, *widths, num_latents, *(() if k is None else (k,)), **options)


def options_of(coder: LinearEncoder, encoder: str) -> dict[str, Any]:
    """What a coder was made with, by the names of its kind, but for its sizes."""
    told = {name: getattr(coder, name) for name in _options([encoder])}
    if "threshold" in told:
        told["threshold"] = coder.initial_threshold
    return told


Kind = TypeVar("Kind", bound=type)


def takes_options_of(*encoders: str, without: Collection[str] = ()) -> Callable[[Kind], Kind]:
    """Of a class whose ``**options`` are those of encoders: its signature then names them one by one."""

    def decorated(kind: Kind) -> Kind:
        own = [about for about in _parameters(kind) if about.kind is not Parameter.VAR_KEYWORD]
        names = {about.name for about in own} | set(without)
        more = [about for name, about in _options(encoders).items() if name not in names]
        kind.__signature__ = Signature([*own, *more])
        return kind

    return decorated


def _options(encoders: Collection[str]) -> dict[str, Parameter]:
    """Those of several kinds, each once: by default None where their own defaults differ."""
    found: dict[str, Parameter] = {}
    for encoder in encoders:
        for about in _parameters(ENCODERS[encoder]):
            if about.name in _SIZES:
                continue
            before = found.setdefault(about.name, about)
            if before.default != about.default:
                annotation = before.annotation | about.annotation | None
                found[about.name] = before.replace(default=None, annotation=annotation)
    return found


def _parameters(kind: type) -> list[Parameter]:
    return list(signature(kind, eval_str=True).parameters.values())
