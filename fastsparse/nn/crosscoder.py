"""The crosscoder: one sparse code for what several places of a network say of the same token."""

from typing import Any

import torch
from torch import Tensor

from fastsparse._validation import check_count
from fastsparse.nn._coders import ENCODERS, made_coder, takes_options_of
from fastsparse.nn._composite import Composite
from fastsparse.nn.sparse_autoencoder import Code, SAELoss


@takes_options_of(*ENCODERS)
class Crosscoder(Composite):
    """A sparse autoencoder of several sources at once, such as layers of a network, or two models.

    Latents read all sources, ``z = encoder(sum over l of W_enc^l (x^l - b_dec^l) + b_enc)``, and write to
    all, ``x^l = z W_dec^l + b_dec^l``: one autoencoder of the sources beside each other. The encoder is that
    of :class:`TopKSAE`, :class:`BatchTopKSAE` or :class:`JumpReLUSAE`; so are the options. Where a penalty
    weighs latents by the norm of an atom, that is the sum of the norms of its parts. The fvu is that of all
    sources together: scale those that vary little up before, if they are to count as much.

    For a training step see :class:`SparseAutoencoder`.

    Args:
        d_model: D, the width of each source.
        num_latents: M.
        k: how many latents describe a token, as the encoder has it; none with ``"jumprelu"``.
        num_sources: L.
        encoder: ``"topk"``, ``"batchtopk"`` or ``"jumprelu"``.
        device, dtype: of the parameters.
        generator: source of the initial atoms, on the parameters' device; default: PyTorch's global one.
        options: of the encoder's class; widths of the atoms are L D.

    Attributes:
        coders: one; its ``W_enc`` and ``W_dec`` are (M, L D), ``b_dec`` (L D,), source by source.

    Raises:
        TypeError, ValueError: a size is not a positive integer, or the encoder doesn't take an option.

    Example:
        >>> import torch
        >>> from fastsparse.nn import Crosscoder
        >>> model = Crosscoder(d_model=8, num_latents=32, k=4, num_sources=3)
        >>> x = torch.randn(16, 3, 8)
        >>> model(x).shape, model.encode(x).indices.shape, model.atoms.shape
        (torch.Size([16, 3, 8]), torch.Size([16, 4]), torch.Size([32, 3, 8]))
        >>> model.loss(x).loss.backward()

    Source: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing".
    """

    def __init__(
        self,
        d_model: int,
        num_latents: int,
        k: float | None = None,
        *,
        num_sources: int = 2,
        encoder: str = "topk",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        d_model = check_count(name, "d_model", d_model, 1)
        num_sources = check_count(name, "num_sources", num_sources, 1)
        options |= {"device": device, "dtype": dtype, "generator": generator}
        widths = (num_sources * d_model,) * 2
        made = made_coder(name, encoder, widths, num_latents, k, centred=True, parts=num_sources, **options)
        super().__init__(encoder, [made])
        self.d_model, self.num_sources = d_model, num_sources

    @classmethod
    def sizes_of(cls, inputs: tuple[int, ...], targets: tuple[int, ...] | None) -> dict[str, int]:
        """``d_model`` and ``num_sources``, for tokens (L, D) without targets: see :meth:`Model.sizes_of`."""
        if targets is not None or len(inputs) != 2:
            raise ValueError(
                f"{cls.__name__} reconstructs inputs (N, num_sources, D), without targets: got rows of "
                f"shape {inputs}, targets {targets}"
            )
        return {"d_model": inputs[1], "num_sources": inputs[0]}

    @property
    def atoms(self) -> Tensor:
        """(M, L, D): what a latent at value 1 adds to each source."""
        return self.coders[0]._atoms().unflatten(1, (self.num_sources, self.d_model))

    def init_decoder_bias_(self, x: Tensor, *, method: str = "geometric_median") -> None:
        """Set ``b_dec`` to the centre of a sample: :meth:`SparseAutoencoder.init_decoder_bias_`."""
        self.coders[0].init_decoder_bias_(self._beside("init_decoder_bias_", x), method=method)

    def encode(self, x: Tensor) -> Code:
        """Describe tokens (..., L, D) by a few latents each, as the encoder's class does."""
        return self.coders[0].encode(self._beside("encode", x))

    def decode(self, code: Code) -> Tensor:
        """Reconstruct tokens (..., L, D) from codes; of a ragged code (N, L, D), a row for every token."""
        return self.coders[0].decode(code).unflatten(-1, (self.num_sources, self.d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct tokens (..., L, D) from their codes."""
        return self.decode(self.encode(x)).reshape(x.shape)

    def loss(self, x: Tensor) -> SAELoss:
        """As :meth:`SparseAutoencoder.loss`, of tokens (..., L, D)."""
        return self.coders[0].loss(self._beside("loss", x))

    def _beside(self, method: str, x: Tensor) -> Tensor:
        """(..., L D)."""
        self._check_stacks(method, "x", x, "num_sources", self.num_sources, self.d_model)
        return x.flatten(-2)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, num_sources={self.num_sources}, encoder={self.encoder!r}"
