"""The transcoder: it reconstructs one place of a network from another, as the layers between them do."""

from typing import Any

import torch
from torch import Tensor, nn

from fastsparse._validation import check_count, check_flag, check_rows
from fastsparse.nn._coders import ENCODERS, made_coder, takes_options_of
from fastsparse.nn._composite import Composite
from fastsparse.nn.fvu import spread_of
from fastsparse.nn.sparse_autoencoder import Code, SAELoss, batch_of


@takes_options_of(*ENCODERS)
class Transcoder(Composite):
    """A sparse model of what a part of a network, such as an MLP, makes of its inputs.

    Of inputs x and outputs y, ``z = encoder(W_enc x + b_enc)`` and ``y = z W_dec + b_dec``, with a skip
    connection ``+ W_skip x``, which leaves to the latents what is not linear. The encoder is that of
    :class:`TopKSAE`, :class:`BatchTopKSAE` or :class:`JumpReLUSAE`, without the centre; so are the options.

    For a training step see :class:`SparseAutoencoder`; its loss is ``loss(x, y)``.

    Args:
        d_in, d_out: the widths of the inputs and the outputs.
        num_latents: M.
        k: how many latents describe a token, as the encoder has it; none with ``"jumprelu"``.
        encoder: ``"topk"``, ``"batchtopk"`` or ``"jumprelu"``.
        skip: whether there is a skip connection.
        device, dtype: of the parameters.
        generator: source of the initial weights, on the parameters' device; default: PyTorch's global one.
        options: of the encoder's class; widths of the atoms are ``d_out``.

    Attributes:
        coders: one; its ``W_enc`` is (M, d_in), ``W_dec`` (M, d_out), ``b_dec`` (d_out,).
        W_skip: (d_out, d_in), 0 at first; None without a skip connection.

    Raises:
        TypeError, ValueError: a size is not a positive integer, or the encoder doesn't take an option.

    Example:
        >>> import torch
        >>> from fastsparse.nn import Transcoder
        >>> model = Transcoder(d_in=8, d_out=6, num_latents=32, k=4, skip=True)
        >>> x, y = torch.randn(16, 8), torch.randn(16, 6)
        >>> model(x).shape, model.encode(x).indices.shape
        (torch.Size([16, 6]), torch.Size([16, 4]))
        >>> model.loss(x, y).loss.backward()

    Source: Dunefsky et al. 2024, arXiv 2406.11944; the skip connection: Paulo et al. 2025, arXiv 2501.18823.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        num_latents: int,
        k: float | None = None,
        *,
        encoder: str = "topk",
        skip: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        widths = check_count(name, "d_in", d_in, 1), check_count(name, "d_out", d_out, 1)
        check_flag(name, "skip", skip)
        factory = {"device": device, "dtype": dtype}
        made = made_coder(name, encoder, widths, num_latents, k, generator=generator, **factory, **options)
        super().__init__(encoder, [made])
        self.d_in, self.d_out, self.skip = *widths, skip
        self.W_skip = nn.Parameter(torch.zeros(d_out, d_in, **factory)) if skip else None

    @classmethod
    def sizes_of(cls, inputs: tuple[int, ...], targets: tuple[int, ...] | None) -> dict[str, int]:
        """``d_in`` and ``d_out``, for tokens (d_in,) and targets (d_out,): see :meth:`Model.sizes_of`."""
        if targets is None or len(inputs) != 1 or len(targets) != 1:
            raise ValueError(
                f"{cls.__name__} makes targets (N, d_out) of inputs (N, d_in): it needs both, got rows of "
                f"shape {inputs}, targets {targets}"
            )
        return {"d_in": inputs[0], "d_out": targets[0]}

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new atoms, and start again from them."""
        super().reset_parameters(generator)
        if self.skip:
            self.W_skip.zero_()

    def init_decoder_bias_(self, x: Tensor, y: Tensor, *, method: str = "geometric_median") -> None:
        """Set ``b_dec`` to the centre of outputs y: :meth:`SparseAutoencoder.init_decoder_bias_`."""
        self.coders[0].init_decoder_bias_(y, method=method)

    def encode(self, x: Tensor) -> Code:
        """Describe inputs (..., d_in) by a few latents each, as the encoder's class does."""
        return self.coders[0].encode(x)

    def decode(self, code: Code, x: Tensor | None = None) -> Tensor:
        """Make outputs of codes, and of the inputs (..., d_in) where there is a skip connection.

        Returns:
            (..., d_out); of a ragged code (N, d_out), a row for every token.

        Raises:
            TypeError: x is missing.
        """
        outputs = self.coders[0].decode(code)
        if not self.skip:
            return outputs
        if x is None:
            raise TypeError(f"{self._name}.decode: x must be given for the skip connection, got None")
        return outputs + self._skipped(x).reshape(outputs.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Make outputs (..., d_out) of inputs (..., d_in)."""
        return self.decode(self.encode(x), x).reshape(*x.shape[:-1], self.d_out)

    def loss(self, x: Tensor, y: Tensor) -> SAELoss:
        """As :meth:`SparseAutoencoder.loss`, of inputs x (..., d_in) and outputs y (..., d_out).

        Raises:
            TypeError, ValueError: one has the wrong dtype or shape, there is no token, or not as many of one
                as of the other.
        """
        (coder,) = self.coders
        dead = coder.dead
        num_dead = int(dead.sum())  # first, as in SparseAutoencoder.loss
        x, y = (batch_of(self._name, *about) for about in (("x", x, self.d_in), ("y", y, self.d_out)))
        if len(x) != len(y):
            raise ValueError(f"{self._name}: y must hold a token for each of the {len(x)} of x, got {len(y)}")
        # The latents' target is what the skip connection leaves.
        return coder._score(x, y - self._skipped(x) if self.skip else y, spread_of(y), dead, num_dead)

    def _skipped(self, x: Tensor) -> Tensor:
        check_rows(self._name, "x", x, self.d_in)
        return x.to(self.W_skip.dtype) @ self.W_skip.T

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_out={self.d_out}, encoder={self.encoder!r}, skip={self.skip}"
