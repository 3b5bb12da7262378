"""Fused, exact, autograd-compatible kernels for sparse encoding in PyTorch."""

from fastsparse import functional
from fastsparse.backend import Backend, backends, use_backend
from fastsparse.functional import *  # noqa: F403 - its __all__ is the families'

__version__ = "0.1.0"

__all__ = ["Backend", "backends", "use_backend"]
__all__ += functional.__all__
