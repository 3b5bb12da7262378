"""The TopK sparse autoencoder with unit-norm atoms and an auxiliary loss that revives dead latents."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsparse._validation import check_rows
from fastsparse.functional import TopK, sparse_decode, spmm, topk_encode
from fastsparse.nn.fvu import fvu

# Rows of a parameter matrix are handled in blocks of about this many numbers, so that a second look at a row
# finds it in the cache.
_BLOCK = 2**18


class SAELoss(NamedTuple):
    """What :meth:`TopKSAE.loss` returns.

    Attributes:
        loss: scalar to minimise: ``fvu + aux_weight * aux``.
        fvu: scalar, the fraction of the batch's variance that the reconstruction leaves unexplained.
        aux: scalar, the same of the residual as dead latents reconstruct it; 0 with nothing to revive.
        l0: scalar, the mean number of positive values a token.
        num_dead: how many latents are dead.
        code: the batch's :class:`fastsparse.TopK` code.
    """

    loss: Tensor
    fvu: Tensor
    aux: Tensor
    l0: Tensor
    num_dead: int
    code: TopK


class TopKSAE(nn.Module):
    """A sparse autoencoder that describes every token by its k strongest latents.

    ``z = relu(topk(W_enc (x - b_dec) + b_enc))``, reconstruction ``z W_dec + b_dec``. The rows of ``W_dec``
    (the atoms) start with norm 1, ``W_enc`` as a copy of ``W_dec``, both biases as 0.

    One training step::

        sae.loss(x).loss.backward()
        sae.remove_parallel_gradient_()
        optimizer.step()
        sae.normalize_decoder_()

    Args:
        d_model: D, the width of the activations.
        num_latents: M.
        k: how many latents describe a token, 1 <= k <= M.
        aux_k: how many dead latents the auxiliary loss uses for a token; 0 turns it off. Default: the power
            of two nearest to D / 2.
        aux_weight: its weight in the loss.
        dead_after: a latent is dead when it has not been positive for this many tokens.
        device, dtype: of the parameters.
        generator: source of the initial atoms, on the parameters' device; default: PyTorch's global one.

    Attributes:
        W_enc: (M, D); b_enc: (M,); W_dec: (M, D), row m is atom m; b_dec: (D,).
        tokens_since_fired: (M,) int64 buffer; :meth:`loss` counts in training mode.

    Raises:
        TypeError, ValueError: a size is not a positive integer, or k is above M.

    Example:
        >>> import torch
        >>> from fastsparse.nn import TopKSAE
        >>> sae = TopKSAE(d_model=8, num_latents=32, k=4)
        >>> x = torch.randn(16, 8)
        >>> sae(x).shape, sae.encode(x).indices.shape
        (torch.Size([16, 8]), torch.Size([16, 4]))
        >>> sae.loss(x).loss.backward()

    Source: Gao et al. 2024, arXiv 2406.04093, section 2.3 and appendix A.
    """

    tokens_since_fired: Tensor

    def __init__(
        self,
        d_model: int,
        num_latents: int,
        k: int,
        *,
        aux_k: int | None = None,
        aux_weight: float = 1 / 32,
        dead_after: int = 10_000_000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_size("d_model", d_model, 1)
        _check_size("num_latents", num_latents, 1)
        _check_size("k", k, 1)
        if k > num_latents:
            raise ValueError(f"TopKSAE: k must be at most num_latents ({num_latents}), got k={k}")
        if aux_k is None:
            aux_k = 2 ** max(0, round(math.log2(d_model / 2)))
        _check_size("aux_k", aux_k, 0)
        _check_size("dead_after", dead_after, 1)
        if not (math.isfinite(aux_weight) and aux_weight >= 0):
            raise ValueError(f"TopKSAE: aux_weight must be finite and at least 0, got {aux_weight}")
        self.d_model, self.num_latents, self.k = d_model, num_latents, k
        self.aux_k, self.aux_weight, self.dead_after = aux_k, aux_weight, dead_after
        factory = {"device": device, "dtype": dtype}
        self.W_enc = nn.Parameter(torch.empty(num_latents, d_model, **factory))
        self.b_enc = nn.Parameter(torch.zeros(num_latents, **factory))
        self.W_dec = nn.Parameter(torch.empty(num_latents, d_model, **factory))
        self.b_dec = nn.Parameter(torch.zeros(d_model, **factory))
        counts = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self.register_buffer("tokens_since_fired", counts)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new atoms, and start again from them."""
        self.W_dec.normal_(generator=generator)
        self.normalize_decoder_()
        self.W_enc.copy_(self.W_dec)
        self.b_enc.zero_()
        self.b_dec.zero_()
        self.tokens_since_fired.zero_()

    @torch.no_grad()
    def init_decoder_bias_(self, x: Tensor, *, method: str = "geometric_median") -> None:
        """Set ``b_dec`` to the centre of a sample of activations, before training.

        Args:
            x: (..., D) floating, at least one token.
            method: ``"geometric_median"`` (outliers count little) or ``"mean"``.

        Raises:
            ValueError: the shape or the method is wrong.

        Source: Gao et al. 2024, arXiv 2406.04093, appendix A.1.
        """
        check_rows("TopKSAE.init_decoder_bias_", "x", x, self.d_model)
        if x.numel() == 0:
            raise ValueError("TopKSAE.init_decoder_bias_: x must hold at least one token, got none")
        if method not in ("geometric_median", "mean"):
            raise ValueError(
                f"TopKSAE.init_decoder_bias_: method must be 'geometric_median' or 'mean', got {method!r}"
            )
        tokens = x.reshape(-1, self.d_model).to(torch.promote_types(self.b_dec.dtype, torch.float32))
        self.b_dec.copy_(tokens.mean(dim=0) if method == "mean" else _geometric_median(tokens))

    def encode(self, x: Tensor) -> TopK:
        """Describe tokens by their k strongest latents.

        Args:
            x: (..., D), the dtype of the parameters, or one that it covers.

        Returns:
            :class:`fastsparse.TopK` ``(values, indices)``, both (..., k), largest first, values at least 0.
        """
        return topk_encode(self._center(x), self.W_enc, self.b_enc, k=self.k)

    def decode(self, code: TopK | Tensor, indices: Tensor | None = None) -> Tensor:
        """Reconstruct tokens from codes.

        Args:
            code: a :class:`fastsparse.TopK`, or its values (..., k).
            indices: (..., k) int64, where ``code`` holds only the values.

        Returns:
            (..., D).

        Raises:
            TypeError: values came without indices.
        """
        if indices is None:
            if isinstance(code, Tensor):
                raise TypeError("TopKSAE.decode: indices must be given with values, got None")
            code, indices = code
        return sparse_decode(code, indices, self.W_dec, self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct tokens (..., D) from their k strongest latents."""
        return self.decode(self.encode(x))

    def loss(self, x: Tensor) -> SAELoss:
        """Score the reconstruction of a batch; in training mode also count dead latents, and revive them.

        With latents dead, AuxK adds ``aux_weight`` times the fraction of the residual's variance that the
        best ``aux_k`` of them leave unexplained. The residual is its fixed target; the gradient reaches the
        dead latents' rows of both matrices, their biases, and ``b_dec`` through the encoder.

        Args:
            x: (..., D), at least one token.

        Returns:
            :class:`SAELoss`.

        Raises:
            TypeError, ValueError: x has the wrong dtype or shape, or no token.

        Source: Gao et al. 2024, arXiv 2406.04093, sections 2 and A.2.
        """
        centered = self._center(x)
        code = topk_encode(centered, self.W_enc, self.b_enc, k=self.k)
        reconstruction = self.decode(code)
        main = total = fvu(reconstruction, x)
        aux = main.new_zeros(())
        dead = self.dead
        num_dead = int(dead.sum())
        aux_k = min(self.aux_k, num_dead)
        if self.training and aux_k > 0:
            residual = x.detach() - reconstruction.detach()
            dead_code = topk_encode(centered, self.W_enc, self.b_enc, k=aux_k, latent_mask=dead)
            aux = fvu(spmm(*dead_code, self.W_dec), residual)  # without b_dec: it is in the reconstruction
            total = main + self.aux_weight * aux
        if self.training:
            self._count(code)
        l0 = code.values.detach().gt(0).sum(dim=-1).float().mean()
        return SAELoss(total, main.detach(), aux.detach(), l0, num_dead, code)

    @property
    def dead(self) -> Tensor:
        """(M,) bool: latents that have not been positive for ``dead_after`` tokens."""
        return self.tokens_since_fired >= self.dead_after

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Take from the gradient of each atom its part along the atom: what would only change the norm.

        Call between ``backward`` and the optimiser's step. The atoms must have norm 1.

        Source: Gao et al. 2024, arXiv 2406.04093, appendix A.1.
        """
        if self.W_dec.grad is None:
            return
        for atoms, grad in zip(_row_blocks(self.W_dec), _row_blocks(self.W_dec.grad), strict=True):
            along = (grad * atoms).sum(dim=1, keepdim=True)
            grad.addcmul_(atoms, along, value=-1)

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scale every atom to norm 1; an atom of zeros stays. Call after the optimiser's step."""
        wide = torch.promote_types(self.W_dec.dtype, torch.float32)
        for atoms in _row_blocks(self.W_dec):
            norms = torch.linalg.vector_norm(atoms, dim=1, keepdim=True, dtype=wide)
            atoms.div_(norms.clamp_min_(torch.finfo(wide).tiny))

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_latents={self.num_latents}, k={self.k}, aux_k={self.aux_k}, "
            f"aux_weight={self.aux_weight:g}, dead_after={self.dead_after}"
        )

    def _center(self, x: Tensor) -> Tensor:
        # Centred before the product and not folded into b_enc: W_enc x and W_enc b_dec may cancel.
        check_rows("TopKSAE", "x", x, self.d_model)
        return x - self.b_dec

    @torch.no_grad()
    def _count(self, code: TopK) -> None:
        """Only a positive value is a firing: rectified entries fill a code up to k."""
        M = self.num_latents
        fired = torch.zeros(M + 1, dtype=torch.bool, device=code.values.device)
        fired.index_fill_(0, torch.where(code.values > 0, code.indices, M).flatten(), True)
        num_tokens = code.indices.shape[:-1].numel()
        self.tokens_since_fired.add_(num_tokens).masked_fill_(fired[:M], 0)


def _check_size(name: str, size: int, least: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"TopKSAE: {name} must be an int, got {size!r} of type {type(size).__name__}")
    if size < least:
        raise ValueError(f"TopKSAE: {name} must be at least {least}, got {size}")


def _row_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of a few rows each on the CPU; the whole matrix elsewhere, where launches cost more."""
    if matrix.device.type != "cpu":
        return (matrix,)
    return matrix.split(max(1, _BLOCK // matrix.shape[1]))


def _geometric_median(points: Tensor, *, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to all, by Weiszfeld's iteration (Tohoku Math J 43, 1937)."""
    median = points.mean(dim=0)
    for _ in range(iterations):
        distances = torch.linalg.vector_norm(points - median, dim=1)
        # A point under the current median would get infinite weight: at 1e-8 of the mean distance it stops.
        nearest = (1e-8 * distances.mean()).clamp_min(torch.finfo(points.dtype).tiny)
        weights = nearest / distances.clamp_min(nearest)
        before, median = median, (weights / weights.sum()) @ points
        if torch.linalg.vector_norm(median - before) <= tolerance * torch.linalg.vector_norm(median):
            break
    return median
