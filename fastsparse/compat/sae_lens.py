"""SAELens: TopK, BatchTopK, Matryoshka, AbsTopK, JumpReLU and matching pursuit, trained and used as they are.

Activations are dense tensors that carry their codes, or of layout COO with ``use_sparse_activations=True``;
``hidden_pre`` is computed when it is read. With ``rescale_acts_by_decoder_norm`` the norms of the atoms, by
which activations are scaled when they are selected, cancel when they are decoded: that is done by the values
before both. The activations that are handed out are the scaled ones, and have their gradients.

Encoders whose latents have thresholds are served as long as few latents are active: a few tokens tell.
Trainers that are made after ``apply(relayout=True, fused_adam=True)`` are faster still: by the layout of one
parameter, see :func:`relayout_`, which does so by itself; and by PyTorch's fused kernel in the place of its
loop, under the same Adam.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_modules
from torch.utils.weak import WeakTensorKeyDictionary

from fastsparse import ops
from fastsparse._options import METHODS
from fastsparse._validation import named
from fastsparse.codes import code_of, codes_to_dense, decode_tagged, preactivations, tag, why_untagged
from fastsparse.codes.preactivations import Preactivations
from fastsparse.compat._layouts import keep_
from fastsparse.compat._library import Library, RefusedError, Site
from fastsparse.compat._optimizers import fuse_
from fastsparse.functional import (
    Ragged,
    TopK,
    batch_topk_encode,
    jump,
    sparse_decode,
    threshold_encode,
    topk_encode,
)
from fastsparse.functional._tensors import flat
from fastsparse.nn._elementwise import _at, _sum_of_rows
from fastsparse.nn._levels import by_prefix

__all__ = ["LIBRARY", "apply", "convert", "relayout_", "status", "undo"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DENSEST = 1 / 16  # the share of active latents from which on dense products are as fast
LONGEST = 1.4  # the norm of an atom up to which the steps of matching pursuit are bounded
STEPS = 64  # of matching pursuit in one call, after which rows that are done are left out


class _Scaled(NamedTuple):
    """How the activations of a code came from its values."""

    values: Tensor
    norms: Tensor  # (M,), as they were


# By the activations that were handed out, beside their codes.
_SCALED = WeakTensorKeyDictionary()
_GATES = WeakTensorKeyDictionary()
# By modules: the share of latents that were active last.
_DENSITY: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


# Encoders that choose how many.


def _encode_with_hidden_pre(original: Callable, self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    acts, sae_in, norms = _select(self, x, self.cfg.rescale_acts_by_decoder_norm)
    hidden_pre = _hidden_pre(self, sae_in, norms)
    return acts, hidden_pre


def _encode(original: Callable, self: Any, x: Tensor) -> Tensor:
    return _select(self, x, self.cfg.rescale_acts_by_decoder_norm)[0]


def _select(self: Any, x: Tensor, rescale: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Activations, the tokens as they were encoded, and the norms of the atoms where they count."""
    from sae_lens.saes.abstopk_sae import AbsTopK
    from sae_lens.saes.batchtopk_sae import BatchTopK
    from sae_lens.saes.topk_sae import TopK as PerToken

    chosen = self.activation_fn
    if type(chosen) not in (PerToken, BatchTopK, AbsTopK):
        raise RefusedError("an activation function that isn't known")
    M, dtype = _check(self, x, chosen.k, chosen)
    coo = type(chosen) is PerToken and chosen.use_sparse_activations
    if coo and x.dim() < 2:
        raise RefusedError("sparse activations of a single token")
    per_batch = type(chosen) is BatchTopK
    N = x.numel() // self.W_enc.shape[0]
    if (int(chosen.k * N) if per_batch else chosen.k) < 1 or not (per_batch or type(chosen.k) is int):
        raise RefusedError("k below 1, or no whole number")
    norms = None
    if rescale:
        _check_tensors(self.W_dec)
        norms = self.W_dec.norm(dim=-1)
        if not bool((norms > 0).all()):  # what the library makes of such an atom is NaN
            raise RefusedError("an atom of norm 0")
    sae_in = _tokens(self, x)
    by = {"latent_scale": None if norms is None else norms.detach()}
    if per_batch:
        code = batch_topk_encode(sae_in, self.W_enc.T, self.b_enc, total=int(chosen.k * N), **by).code
    else:
        by["activation"] = "abs" if type(chosen) is AbsTopK else "relu"
        code = topk_encode(sae_in, self.W_enc.T, self.b_enc, k=chosen.k, **by)
    return _handed_out(code, dtype, norms, M, sae_in.shape[:-1], coo), sae_in, norms


def _handed_out(
    code: TopK | Ragged, dtype: torch.dtype, norms: Tensor | None, M: int, leading: torch.Size,
    coo: bool = False,
) -> Tensor:  # fmt: skip
    """A code as activations (..., M), scaled by the norms of its atoms."""
    values = code.values.to(dtype)
    code = code._replace(values=values if norms is None else values * norms[code.indices])
    acts = _coo(code, M) if coo else codes_to_dense(code, M, leading=leading)
    if norms is not None:
        _SCALED[acts] = _Scaled(values, norms.detach())
    return acts


def _coo(code: TopK, M: int) -> Tensor:
    *leading, k = code.indices.shape
    rows = torch.arange(code.indices.numel() // k, device=code.indices.device).repeat_interleave(k)
    places = torch.stack((*torch.unravel_index(rows, leading), code.indices.flatten()))
    return tag(torch.sparse_coo_tensor(places, code.values.flatten(), (*leading, M)), code)


def _hidden_pre(self: Any, sae_in: Tensor, norms: Tensor | None) -> Tensor:
    with torch.autocast(sae_in.device.type, enabled=False):
        return preactivations(sae_in, self.W_enc.T, self.b_enc, scale=norms)


# Decoders.


def _act_times_W_dec(
    original: Callable, feature_acts: Tensor, W_dec: Tensor, rescale_acts_by_decoder_norm: bool
) -> Tensor:
    return _decoded(feature_acts, W_dec, rescale_acts_by_decoder_norm)


def _decoded(acts: Tensor, W_dec: Tensor, rescale: bool = False) -> Tensor:
    """``acts @ W_dec``, of activations divided by the norms of atoms where these are to cancel."""
    code = _code_of(acts)
    _check_decoder(acts, W_dec)
    scaled = _scaled(acts, W_dec) if rescale else None
    with torch.autocast(acts.device.type, enabled=_autocasts(acts) and not acts.is_sparse):
        if scaled is not None:
            return decode_tagged(acts, code._replace(values=scaled.values), W_dec, norms=scaled.norms)
        if not rescale:
            return decode_tagged(acts, code, W_dec)
        code = _unscaled(acts, code, W_dec)
        decoded = sparse_decode(*code[:2], W_dec, None, *code[2:])
    return decoded.reshape(*acts.shape[:-1], W_dec.shape[1])


def _scaled(acts: Tensor, W_dec: Tensor) -> _Scaled | None:
    """What activations were before they were scaled by norms that are still those of the atoms."""
    scaled = _SCALED.get(acts)
    # Norms are looked at: writes through .data, which the library does, leave no other trace.
    is_current = scaled is not None and torch.equal(scaled.norms, W_dec.detach().norm(dim=-1))
    return scaled if is_current else None


def _unscaled(acts: Tensor, code: TopK | Ragged, W_dec: Tensor) -> TopK | Ragged:
    if (scaled := _scaled(acts, W_dec)) is not None:
        return code._replace(values=scaled.values)
    inverse = 1 / W_dec.norm(dim=-1)
    if not bool(inverse.isfinite().all()):
        raise RefusedError("an atom of norm 0")
    return code._replace(values=code.values * inverse[code.indices])


def _decode(original: Callable, self: Any, feature_acts: Tensor) -> Tensor:
    return _finished(self, _decoded(feature_acts, self.W_dec) + self.b_dec)


def _decode_rescaled(original: Callable, self: Any, feature_acts: Tensor) -> Tensor:
    decoded = _decoded(feature_acts, self.W_dec, self.cfg.rescale_acts_by_decoder_norm)
    return _finished(self, decoded + self.b_dec)


def _decode_pursuit(original: Callable, self: Any, feature_acts: Tensor) -> Tensor:
    decoded = _decoded(feature_acts, self.W_dec)
    return _finished(self, decoded + self.b_dec if self.cfg.apply_b_dec_to_input else decoded)


def _finished(self: Any, sae_out: Tensor) -> Tensor:
    sae_out = self.run_time_activation_norm_fn_out(self.hook_sae_recons(sae_out))
    return self.reshape_fn_out(sae_out, self.d_head)


def _decode_transcoder(original: Callable, self: Any, feature_acts: Tensor) -> Tensor:
    return self.hook_sae_recons(_decoded(feature_acts, self.W_dec) + self.b_dec)


# Losses, and what else reads activations.


def _topk_aux_acts(original: Callable, k_aux: int, hidden_pre: Tensor, dead_neuron_mask: Tensor) -> Tensor:
    return _of_the_dead(k_aux, hidden_pre, dead_neuron_mask, "none")


def _abstopk_aux_acts(original: Callable, k_aux: int, hidden_pre: Tensor, dead_neuron_mask: Tensor) -> Tensor:
    return _of_the_dead(k_aux, hidden_pre, dead_neuron_mask, "abs")


def _of_the_dead(k: int, hidden_pre: Tensor, dead: Tensor, activation: str) -> Tensor:
    x, weight, bias, norms = _sources(hidden_pre)
    M = weight.shape[0]
    if dead.dtype != torch.bool or dead.shape != (M,):
        raise RefusedError("a mask that isn't one of latents")
    LIBRARY.refuse_unless_worth(x, M, k)
    its = dead.nonzero()[:, 0]
    if not 1 <= k <= len(its):
        raise RefusedError("k beyond the number of dead latents")
    # Rows of their own: nothing else is read of a matrix whose rows may not lie together.
    weight, bias = weight.index_select(0, its), bias.index_select(0, its)
    if k == len(its):
        code = TopK(x @ weight.T + bias, its.expand(*x.shape[:-1], k).contiguous())
    else:
        scale = None if norms is None else norms.detach()[its]
        code = topk_encode(x, weight, bias, k=k, activation=activation, latent_scale=scale)
        code = code._replace(indices=its[code.indices])
    return _handed_out(code, hidden_pre.dtype, norms, M, x.shape[:-1])


def _sources(hidden_pre: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What pre-activations are made of."""
    if type(hidden_pre) is not Preactivations or hidden_pre.mask is not None:
        raise RefusedError("pre-activations that the library computed")
    if hidden_pre.computed is not None:
        raise RefusedError("pre-activations that were read")
    hidden_pre.check()
    return hidden_pre.sources


@torch.no_grad()
def _update_topk_threshold(original: Callable, self: Any, acts_topk: Tensor) -> None:
    values = _code_of(acts_topk).values
    positive = values[values > 0]
    if positive.numel() > 0:
        lr, least = self.cfg.topk_threshold_lr, positive.min().to(self.topk_threshold.dtype)
        self.topk_threshold = (1 - lr) * self.topk_threshold + lr * least


def _iterable_decode(
    original: Callable, self: Any, feature_acts: Tensor, include_outer_loss: bool = False
) -> Iterator[tuple[int, Tensor]]:
    code = _code_of(feature_acts)
    _check_decoder(feature_acts, self.W_dec)
    if feature_acts.dim() != 2 or feature_acts.is_sparse:
        raise RefusedError("activations that aren't a dense matrix")
    widths = self.cfg.matryoshka_widths
    if widths[-1] != feature_acts.shape[1]:
        raise RefusedError("a last width below the number of latents")
    if self.cfg.rescale_acts_by_decoder_norm:
        code = _unscaled(feature_acts, code, self.W_dec)

    def levels() -> Iterator[tuple[int, Tensor]]:
        found = by_prefix(code, widths, self.W_dec, self.b_dec)
        for width, level in zip(widths, found, strict=True):
            if include_outer_loss or width != widths[-1]:
                yield width, self.run_time_activation_norm_fn_out(level)

    return levels()


# The trainer.


def _train_step(original: Callable, self: Any, sae: Any, sae_in: Tensor) -> Any:
    """A step whose statistics, four passes over dense activations, are those of the code."""
    from sae_lens.saes.matching_pursuit_sae import MatchingPursuitTrainingSAE
    from sae_lens.saes.sae import TrainStepInput

    encoder = self.sae.encode_with_hidden_pre
    if not getattr(encoder, "_fastsparse", False) or isinstance(self.sae, MatchingPursuitTrainingSAE):
        raise RefusedError("an encoder that isn't served, or takes an atom twice")
    if sae_in.dim() != 2:
        raise RefusedError("tokens that aren't a matrix")
    sae.train()
    with self.autocast_if_enabled:
        output = self.sae.training_forward_pass(
            step_input=TrainStepInput(
                sae_in=sae_in,
                coefficients=self.get_coefficients(),
                dead_neuron_mask=self.dead_neurons,
                n_training_steps=self.n_training_steps,
                is_logging_step=self._is_logging_step(),
            )
        )
        with torch.no_grad():
            counts = _firings(output.feature_acts)
            self.n_forward_passes_since_fired += 1
            self.n_forward_passes_since_fired[counts > 0] = 0
            self.act_freq_scores += counts
            self.n_frac_active_samples += self.cfg.train_batch_size_samples
    output.loss.backward()
    nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    self.optimizer.step()
    self.optimizer.zero_grad()
    for scheduler in (self.lr_scheduler, *self.coefficient_schedulers.values()):
        scheduler.step()
    return output


def _firings(acts: Tensor) -> Tensor:
    """(M,) fp32, in how many of N tokens each latent isn't 0."""
    code = code_of(acts)
    if code is None:
        counts = acts.bool().float().sum(0)
        return counts.to_dense() if counts.is_sparse else counts
    counts = torch.zeros(acts.shape[-1], dtype=torch.int64, device=acts.device)
    nonzero = (code.values != 0).flatten()
    return counts.scatter_add_(0, code.indices.flatten(), nonzero.to(torch.int64)).float()


# Encoders with thresholds.


def _encode_above(original: Callable, self: Any, x: Tensor) -> Tensor:
    """JumpReLU over ReLU."""
    return _above(self, x, lambda: self.threshold.detach().clamp(min=0))


def _encode_positive(original: Callable, self: Any, x: Tensor) -> Tensor:
    return _above(self, x, lambda: self.b_enc.detach().new_zeros(()).expand(self.b_enc.shape))


def _encode_transcoder(original: Callable, self: Any, x: Tensor) -> Tensor:
    """Of whatever activation it was given."""
    if type(self.activation_fn) is nn.ReLU:
        return _encode_positive(original, self, x)
    return _select(self, x, rescale=False)[0]


def _above(self: Any, x: Tensor, bounds: Callable[[], Tensor]) -> Tensor:
    if type(self.activation_fn) is not nn.ReLU:
        raise RefusedError("an activation function that isn't known")
    sae_in, code, M, dtype = _beyond(self, x, bounds(), self.activation_fn)
    return codes_to_dense(code._replace(values=code.values.to(dtype)), M, leading=sae_in.shape[:-1])


def _beyond(self: Any, x: Tensor, bounds: Tensor, *looked_at: nn.Module):
    """The tokens as they were encoded, the pre-activations beyond bounds (M,), M, and the dtype of all."""
    M, dtype = _check(self, x, None, self.hook_sae_input, *looked_at)
    if bool(bounds.isnan().any()):
        raise RefusedError("a threshold that is NaN")
    sae_in = _tokens(self, x)  # once more if this is refused: nothing looks at that
    rows = flat(sae_in)
    N = rows.shape[0]
    if N == 0:
        raise RefusedError("little work")
    if _DENSITY.get(self, 1) > DENSEST:
        with torch.no_grad():
            few = threshold_encode(rows[::64], self.W_enc.T, self.b_enc, threshold=bounds)
        _DENSITY[self] = few.values.numel() / (-(-N // 64) * M)
        if _DENSITY[self] > DENSEST:
            raise RefusedError("more than one latent of 16 is active")
    code = threshold_encode(rows, self.W_enc.T, self.b_enc, threshold=bounds)
    _DENSITY[self] = code.values.numel() / (N * M)
    return sae_in, code, M, dtype


def _encode_jumps(original: Callable, self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """JumpReLU as it is trained: what is active, and what is in the band about its threshold."""
    if not self.bandwidth > 0:
        raise RefusedError("a bandwidth that isn't above 0")
    below = self.threshold.detach() - self.bandwidth / 2
    sae_in, code, M, dtype = _beyond(self, x, below)
    thresholds = _at(self.threshold.to(dtype), code)
    ste = self.cfg.jumprelu_ste_to_input
    values, gates = jump(code.values.to(dtype), thresholds, self.bandwidth, ste_to_input=ste)
    acts = codes_to_dense(code._replace(values=values), M, leading=sae_in.shape[:-1])
    _GATES[acts] = gates
    return acts, _hidden_pre(self, sae_in, None)


def _jump_losses(
    original: Callable, self: Any, step_input: Any, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
) -> dict[str, Tensor]:
    code, gates = _code_of(feature_acts), _GATES.get(feature_acts)
    mode, before = self.cfg.jumprelu_sparsity_loss_mode, self.cfg.pre_act_loss_coefficient
    if gates is None or mode not in ("step", "quadratic", "tanh"):
        raise RefusedError("a sparsity loss or activations that aren't known")
    sources = None if before is None else _sources(hidden_pre)
    M, dtype = self.W_dec.shape[0], feature_acts.dtype
    norms = self.W_dec.norm(dim=1) if mode == "tanh" or before is not None else None
    if mode == "tanh":
        per_item = torch.tanh(self.cfg.jumprelu_tanh_scale * code.values * _at(norms, code))
    else:
        per_item = gates
    per_item = _sum_of_rows(per_item, code, M)
    if mode == "quadratic":
        target = self.cfg.target_l0
        per_item = 2 / target * (per_item - target) ** 2
    losses = {"l0_loss": (step_input.coefficients["l0"] * per_item).mean()}
    if before is not None:
        losses["pre_act_loss"] = gates.new_zeros(())
        dead = step_input.dead_neuron_mask
        if dead is not None and bool(dead.any()):
            x, weight, bias, _ = sources
            found = x @ weight[dead].T + bias[dead]
            short = (self.threshold.to(dtype)[dead] - found).relu() * norms[dead]
            losses["pre_act_loss"] = before * short.sum(dim=-1).mean()
    return losses


# Matching pursuit.


def _pursue(original: Callable, self: Any, x: Tensor) -> Tensor:
    if _is_looked_at(self.hook_sae_input):
        raise RefusedError("hooks")
    of = self.cfg
    return _encode_matching_pursuit(
        original, self.process_sae_in(x), self.W_dec, of.residual_threshold, of.max_iterations,
        of.stop_on_duplicate_support,
    )  # fmt: skip


def _pursue_with_hidden_pre(original: Callable, self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    acts = _pursue(original, self, x)
    return acts, torch.zeros_like(acts)


def _encode_matching_pursuit(
    original: Callable, sae_in_centered: Tensor, W_dec: Tensor, residual_threshold: float,
    max_iterations: int | None, stop_on_duplicate_support: bool,
) -> Tensor:  # fmt: skip
    x, (M, D) = sae_in_centered, W_dec.shape
    _check_tensors(x, W_dec)
    if x.shape[-1] != D or x.dim() < 1 or x.dtype != W_dec.dtype or x.dtype not in DTYPES[:2]:
        raise RefusedError("tokens of another width or dtype, or of half precision")
    steps = D if max_iterations is None else max_iterations
    if steps < 1 or x.numel() == 0:
        raise RefusedError("no step")
    if _autocasts(x):
        raise RefusedError("autocast")
    if x.device.type != "cpu":
        raise RefusedError("a device other than the CPU")
    LIBRARY.refuse_unless_worth(x, M)
    if not bool(W_dec.detach().norm(dim=-1).max() <= LONGEST):
        raise RefusedError("an atom of a norm above 1.4")
    leading, residual = x.shape[:-1], flat(x)
    # Here a row takes its first step however short it is.
    first = residual_threshold > 0 and bool((residual.detach().norm(dim=-1) < residual_threshold).any())
    parts, rows, used = [], torch.arange(residual.shape[0]), None
    while steps > 0 and rows.numel() > 0:
        count = 1 if first else min(steps, STEPS)
        tol = 0.0 if first or residual_threshold <= 0 else float(residual_threshold)
        # The op is told that norms are 1, by which it divides by none: it chooses by w.r and takes w.r.
        values, indices, residual = ops.matching_pursuit(
            residual, W_dec, count, tol, True, True, METHODS.index("auto")
        )
        going = values.detach() != 0
        if stop_on_duplicate_support:
            used = indices if used is None else torch.cat([used, indices], dim=1)
            again = _repeated(used)[:, -count:] & going
            after = again.cumsum(dim=1) - again.long() > 0
            values, going = values.masked_fill(after, 0), going & ~after & ~again
        parts.append((rows, values, indices))
        goes_on = going[:, -1]
        if residual_threshold > 0:
            goes_on = goes_on & ~(residual.detach().norm(dim=-1) < residual_threshold)
        rows, residual, first, steps = rows[goes_on], residual[goes_on], False, steps - count
        used = None if used is None else used[goes_on]
    total = sum(indices.shape[1] for _, _, indices in parts)
    code = TopK(x.new_zeros(x.numel() // D, total), torch.zeros(x.numel() // D, total, dtype=torch.int64))
    place = 0
    for rows, *part in parts if len(parts) > 1 else ():
        to = rows.unsqueeze(1), torch.arange(place, place := place + part[0].shape[1])
        code = TopK(*(whole.index_put(to, some) for whole, some in zip(code, part, strict=True)))
    code = code if len(parts) > 1 else TopK(*parts[0][1:])
    return codes_to_dense(TopK(*(part.reshape(*leading, total) for part in code)), M)


def _repeated(indices: Tensor) -> Tensor:
    """Which entries of a row stand further left in it too."""
    ordered, order = indices.sort(dim=1, stable=True)
    again = nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    return torch.zeros_like(again).scatter(1, order, again)


# What is refused.


def _check(self: Any, x: Tensor, k: float | None, *looked_at: nn.Module) -> tuple[int, torch.dtype]:
    """M, and the dtype of what the library computes from tokens x."""
    from sae_lens.saes.topk_sae import SparseHookPoint
    from transformer_lens.hook_points import HookPoint

    points = self.hook_sae_acts_pre, self.hook_sae_acts_post
    if any(type(point) not in (HookPoint, SparseHookPoint, nn.Identity) for point in points):
        raise RefusedError("hook points that aren't known")
    if torch_modules._has_any_global_hook() or any(map(_is_looked_at, (*points, *looked_at))):
        raise RefusedError("hooks")
    _check_tensors(x, self.W_enc, self.b_enc)
    dtype, autocasts = self.dtype, _autocasts(self.W_enc)
    if not (dtype == self.W_enc.dtype == self.b_enc.dtype) or dtype not in DTYPES:
        raise RefusedError("parameters of several dtypes, or of one that our ops don't take")
    if autocasts and dtype not in DTYPES[:2]:
        raise RefusedError("autocast of parameters of half precision")
    M = self.W_enc.shape[1]
    LIBRARY.refuse_unless_worth(x, M, k)
    return M, dtype


def _tokens(self: Any, x: Tensor) -> Tensor:
    """As they are encoded."""
    sae_in = self.process_sae_in(x)
    if type(sae_in) is not Tensor or sae_in.dtype != self.dtype or sae_in.shape[-1] != self.W_enc.shape[0]:
        raise RefusedError("tokens of another width or dtype")
    return sae_in


def _check_tensors(*tensors: Tensor) -> None:
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            raise RefusedError("a subclass of Tensor, or a sparse one")
        if forward_ad._current_level >= 0:
            raise RefusedError("forward-mode derivatives")
        if tensor.device.type not in ("cpu", "cuda"):
            raise RefusedError("a device that our ops don't run on")


def _check_decoder(acts: Tensor, W_dec: Tensor) -> None:
    _check_tensors(W_dec)
    if W_dec.dim() != 2 or W_dec.shape[0] != acts.shape[-1]:
        raise RefusedError("a decoder of another shape")
    if (W_dec.dtype, W_dec.device) != (acts.dtype, acts.device):
        raise RefusedError("a decoder of another dtype or on another device")


def _code_of(acts: Tensor) -> TopK | Ragged:
    why = why_untagged(acts)
    if why is not None:
        raise RefusedError(f"activations: {why}")
    return code_of(acts)


def _is_looked_at(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in hooks)


def _autocasts(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


# The layout of the encoder.


@torch.no_grad()
def relayout_(sae: nn.Module) -> nn.Module:
    """Keep ``W_enc`` (D, M) in memory as its transpose, a latent a row, which is how gradients come.

    Nobody sees it but by its strides. State dicts hold it as ever, so that it can be saved, and it stays when
    one is loaded. Call it before the optimiser is made, whose state then is laid out so too.

    Args:
        sae: an SAE of the library whose ``W_enc`` is a parameter.

    Returns:
        ``sae``.

    Raises:
        TypeError: it is none.
    """
    W_enc = getattr(sae, "_parameters", {}).get("W_enc")
    if W_enc is None or W_enc.dim() != 2:
        raise TypeError(f"relayout_: sae must have a parameter W_enc (D, M), got {named(sae)}")
    keep_(sae, "W_enc", transposed=True)
    return sae


def _make_trainer(original: Callable, self: Any, *args: Any, **kwargs: Any) -> None:
    """By what :func:`apply` was asked for: its optimiser has no state yet."""
    original(self, *args, **kwargs)
    is_served = getattr(getattr(self.sae, "encode_with_hidden_pre", None), "_fastsparse", False)
    if "relayout" in LIBRARY.chosen and is_served and "W_enc" in self.sae._parameters:
        relayout_(self.sae)
    if "fused_adam" in LIBRARY.chosen:
        fuse_(self.optimizer)


# The sites.


_SITES: dict[str, dict[str, tuple[str, Callable]]] = {
    "saes.topk_sae": {
        "TopKTrainingSAE.encode_with_hidden_pre": ("0deaab8e48b5ae33", _encode_with_hidden_pre),
        "TopKTrainingSAE.decode": ("dbdcd8d0d2476611", _decode_rescaled),
        "TopKSAE.encode": ("1ab2f2ec890fc15a", _encode),
        "TopKSAE.decode": ("89789d70ee38651e", _decode_rescaled),
        "act_times_W_dec": ("c5fcfe267fef0f72", _act_times_W_dec),
        "calculate_topk_aux_acts": ("f55b4077c7b70040", _topk_aux_acts),
    },
    "training.sae_trainer": {
        "SAETrainer._train_step": ("f609adeefc260444", _train_step),
    },
    "saes.abstopk_sae": {
        "calculate_abstopk_aux_acts": ("a11062c89854134b", _abstopk_aux_acts),
    },
    "saes.batchtopk_sae": {
        "BatchTopKTrainingSAE.update_topk_threshold": ("9637627d7a9cdda8", _update_topk_threshold),
    },
    "saes.matryoshka_batchtopk_sae": {
        "MatryoshkaBatchTopKTrainingSAE._iterable_decode": ("5a5cb44711472169", _iterable_decode),
    },
    "saes.jumprelu_sae": {
        "JumpReLUSAE.encode": ("d2d55b4cde5beb38", _encode_above),
        "JumpReLUSAE.decode": ("c3c296933f210e39", _decode),
        "JumpReLUTrainingSAE.encode_with_hidden_pre": ("4c0ab061efac6974", _encode_jumps),
        "JumpReLUTrainingSAE.calculate_aux_loss": ("205acfe983bf4d92", _jump_losses),
    },
    "saes.standard_sae": {
        "StandardSAE.encode": ("03a48274f5cae552", _encode_positive),
        "StandardSAE.decode": ("555b9f58e312caba", _decode),
    },
    "saes.sae": {
        "TrainingSAE.decode": ("ab3493a65dd79fb1", _decode),
    },
    "saes.transcoder": {
        "Transcoder.encode": ("9e7e6c890743843a", _encode_transcoder),
        "Transcoder.decode": ("6ba500d58dc3693b", _decode_transcoder),
        "JumpReLUTranscoder.encode": ("1017889ad6e8596f", _encode_above),
    },
    "saes.matching_pursuit_sae": {
        "_encode_matching_pursuit": ("fe84f459e598c4d1", _encode_matching_pursuit),
        "MatchingPursuitSAE.encode": ("c22748c5e40b1cc9", _pursue),
        "MatchingPursuitTrainingSAE.encode_with_hidden_pre": ("4409b55959606b81", _pursue_with_hidden_pre),
        "MatchingPursuitSAE.decode": ("a88901bbd9cd1327", _decode_pursuit),
        "MatchingPursuitTrainingSAE.decode": ("a88901bbd9cd1327", _decode_pursuit),
    },
}


def _sites() -> Iterator[Site]:
    for module, sites in _SITES.items():
        for name, (digest, replacement) in sites.items():
            yield Site(f"sae_lens.{module}", name, digest, replacement)


_TRAINER = Site("sae_lens.training.sae_trainer", "SAETrainer.__init__", "3d82312a4a847160", _make_trainer)
LIBRARY = Library(
    "sae_lens", "sae-lens", ("6.54", "6.55"), tuple(_sites()),
    {"relayout": (_TRAINER,), "fused_adam": (_TRAINER,)},
)  # fmt: skip
apply, undo, status, convert = LIBRARY.apply, LIBRARY.undo, LIBRARY.status, LIBRARY.convert
