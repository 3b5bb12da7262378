"""The shapes that are measured: those that the project promises something at, and those that people train."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import TypeVar

KINDS = ("gaussian", "correlated")


@dataclass(frozen=True)
class Sizes:
    """One problem size: its sizes are the fields of one letter.

    Attributes:
        name: unique; where it comes from.
    """

    name: str

    def __str__(self) -> str:
        return " ".join(f"{letter}={size}" for letter, size in self.sizes.items())

    @property
    def sizes(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self) if len(field.name) == 1}


@dataclass(frozen=True)
class Shape(Sizes):
    """One problem size of a sparse code.

    Attributes:
        N, D, M, k: tokens, model width, latents, active latents.
        speedup: how many times as fast as torch eager the encoder must be here.
        faiss: the same against ``faiss.knn``.
        headline: shown in the tables; also measured in bf16 and under torch.compile.
        correlated: also measured on correlated, heavy-tailed data.
    """

    N: int
    D: int
    M: int
    k: int
    speedup: float = 1.0
    faiss: float = 1.0
    headline: bool = False
    correlated: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        return KINDS[: 1 + self.correlated]

    def tiny(self) -> "Shape":
        """The same case small enough for a trial of the machinery, on kernels that are interpreted even."""
        return replace(self, N=min(self.N, 8), D=24, M=192, k=4)


@dataclass(frozen=True)
class Sequences(Sizes):
    """One problem size of a recurrence.

    Attributes:
        B, T, H: sequences, their steps, channels.
        headline: shown in the tables.
    """

    B: int
    T: int
    H: int
    headline: bool = False

    def tiny(self) -> "Sequences":
        """As :meth:`Shape.tiny`."""
        return replace(self, B=min(self.B, 2), T=min(self.T, 20), H=min(self.H, 8))


@dataclass(frozen=True)
class Rows(Sizes):
    """One problem size of an activation.

    Attributes:
        N, D: tokens, and their width.
        headline: shown in the tables.
    """

    N: int
    D: int
    headline: bool = False

    def tiny(self) -> "Rows":
        """As :meth:`Shape.tiny`."""
        return replace(self, N=min(self.N, 8), D=24)


AnyShape = TypeVar("AnyShape", Shape, Sequences, Rows)


@dataclass(frozen=True)
class Given:
    """What one case is measured on.

    Attributes:
        shape: its size.
        dtype: of its tensors.
        kind: of its data, "" where there is but one.
        priority: of a run whose time is kept, least first.
    """

    shape: Shape | Sequences | Rows
    dtype: str = "fp32"
    kind: str = ""
    priority: int = 0

    def name(self, what: str = "") -> str:
        """A case's name, but for what goes without saying.

        Example:
            >>> Given(HEADLINE[0], "bf16", "gaussian").name(), Given(RECURRENCE).name("forward")
            ('wide, gaussian, bf16', 'layer, forward')
        """
        parts = self.shape.name, self.kind, self.dtype, what
        return ", ".join(part for part in parts if part not in ("fp32", ""))


def each(
    priority: int, shapes: Sequence[AnyShape], *dtypes: str, kinds: Sequence[str] = KINDS[:1]
) -> Iterator[Given]:
    """Every combination; the kinds of a recurrence's data are ``("",)``."""
    for shape, kind, dtype in product(shapes, kinds, dtypes):
        yield Given(shape, dtype, kind, priority)


def grid(shapes: Sequence[AnyShape], kinds: Sequence[str] = KINDS[:1]) -> Iterator[Given]:
    """A choice's cases, the first shape first."""
    for priority, shape in enumerate(shapes):
        yield from each(priority, [shape], "bf16", "fp32", kinds=kinds)


HEADLINE = (
    Shape("wide", 1024, 768, 16384, 32, speedup=2.5, faiss=1.8, headline=True, correlated=True),
    Shape("small", 4096, 384, 6144, 16, speedup=2.0, faiss=1.5, headline=True, correlated=True),
    Shape("deep", 512, 2048, 32768, 64, speedup=2.0, faiss=1.4, headline=True, correlated=True),
)

FEW_TOKENS = (
    Shape("1 token", 1, 768, 16384, 32, headline=True),
    Shape("8 tokens", 8, 768, 16384, 32),
    Shape("64 tokens", 64, 768, 16384, 32),
)

# What people train. A step's full batch where it fits the time that a run may take: openai's 16384 tokens and
# the SAELens batches at D > 768 are cut, which is noted in the name.
TRAINING = (
    Shape("openai, 4096 of 16384 tokens", 4096, 768, 32768, 32, speedup=1.2),
    Shape("sparsify Llama-3-8B, 64 tokens", 64, 4096, 131072, 192, speedup=1.2, correlated=True),
    Shape("sparsify Llama-3-8B, 256 tokens", 256, 4096, 131072, 192, speedup=1.2),
    Shape("SAELens 16k", 4096, 768, 16384, 100, speedup=1.2, correlated=True),
    Shape("SAELens 16k D=2304, 1024 of 4096 tokens", 1024, 2304, 16384, 100, speedup=1.2),
    Shape("SAELens 16k D=3584, 1024 of 4096 tokens", 1024, 3584, 16384, 100, speedup=1.2),
    Shape("SAELens 65k D=2304, 64 of 4096 tokens", 64, 2304, 65536, 100, speedup=1.2),
    Shape("SAELens 131k, 64 of 4096 tokens", 64, 768, 131072, 100, speedup=1.2),
    Shape("SAELens 262k, 64 of 4096 tokens", 64, 768, 262144, 100, speedup=1.2),
    Shape("SAELens 1M, 64 of 4096 tokens", 64, 768, 1048576, 100, speedup=1.2),
)

ALL = HEADLINE + FEW_TOKENS + TRAINING

STEP = (
    Shape("SAE step", 2048, 768, 16384, 32, headline=True),
    Shape("small SAE step", 1024, 384, 6144, 16, headline=True),
)

# A batch of SAELens by default, half of one of dictionary_learning; tokens of the width of pythia-70m.
WIDE_STEP = Shape("wide step", 4096, 512, 65536, 32, headline=True)

MEMORY = Shape("encode", 8192, 256, 131072, 32, headline=True)

PURSUIT = Shape("small", 512, 384, 6144, 16, headline=True, correlated=True)
WIDE_PURSUIT = Shape("wide", 4096, 768, 16384, 32, headline=True)
LONG_PURSUIT = Shape("long", 128, 384, 6144, 256)
PURSUIT_STEP = Shape("MP-SAE step", 2048, 384, 6144, 16, headline=True)

RECURRENCE = Sequences("layer", 8, 1024, 256, headline=True)
LONG_RECURRENCES = (
    Sequences("many channels", 8, 512, 4096),
    Sequences("many steps", 4, 16384, 256),
)

# On a GPU, too.
ACTIVATIONS = (Rows("layer", 8192, 2048, headline=True), Rows("small", 256, 768, headline=True))

# On a GPU: the two problems that promises are made at, then what people train, at their full batches.
GPU_HEADLINE = (
    Shape("Llama-3-8B", 8192, 4096, 131072, 64, headline=True),
    Shape("GPT-2", 8192, 768, 32768, 32, headline=True),
)
GPU_TRAINING = (
    Shape("openai", 16384, 768, 32768, 32),
    Shape("sparsify Llama-3-8B", 8192, 4096, 131072, 192),
    Shape("SAELens 16k", 4096, 768, 16384, 100),
    Shape("SAELens 65k D=2304", 4096, 2304, 65536, 100),
    Shape("SAELens 16k D=3584", 4096, 3584, 16384, 100),
    Shape("SAELens 131k D=2304", 4096, 2304, 131072, 100),
    Shape("SAELens 262k D=2304", 4096, 2304, 262144, 100),
    Shape("SAELens 1M", 4096, 768, 1048576, 100),
)
GPU_FEW_TOKENS = (
    Shape("1 token", 1, 4096, 131072, 64),
    Shape("64 tokens", 64, 4096, 131072, 64),
)
GPU_AUXK = Shape("openai AuxK", 16384, 768, 32768, 256)
GPU_STEP = (
    Shape("sparsify Llama-3-8B step", 8192, 4096, 131072, 192, headline=True),
    Shape("openai step", 16384, 768, 32768, 32, headline=True),
)
GPU_RECURRENCES = (
    Sequences("layer", 8, 2048, 1024, headline=True),
    Sequences("many sequences", 32, 512, 4096),
    Sequences("many steps", 1, 32768, 64),
    Sequences("small layer", 8, 1024, 256),
)

# Where our own backends are compared: tokens by models, and recurrences of few sequences, steps and channels.
GRID = tuple(
    Shape(f"N={N} D={D} M={M} k={k}", N, D, M, k)
    for N in (8192, 64, 1024)
    for D, M, k in ((768, 32768, 32), (4096, 131072, 64), (768, 16384, 100), (2304, 65536, 100))
)
GRID_RECURRENCES = tuple(
    Sequences(f"B={B} T={T} H={H}", B, T, H)
    for B, T, H in (
        (8, 2048, 1024),
        (1, 32768, 64),
        (1, 2048, 1024),
        (8, 8192, 64),
        (32, 512, 4096),
        (1, 512, 64),
    )
)
