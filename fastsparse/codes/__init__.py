"""Sparse codes for code that passes dense (N, M) activations around.

*Tagged*: :func:`codes_to_dense` makes a dense tensor that carries its code, from which
:func:`decode_from_dense` decodes without a dense product as long as nobody has touched the tensor. *Lazy*:
:func:`preactivations` is a tensor that nobody has computed; what asks for its largest entries gets them from
``topk_encode``, what reads it gets it computed.
"""

from fastsparse.codes.preactivations import preactivations
from fastsparse.codes.tagged import (
    code_of,
    codes_to_dense,
    decode_from_dense,
    decode_tagged,
    fired,
    tag,
    why_untagged,
)

__all__ = [
    "code_of", "codes_to_dense", "decode_from_dense", "decode_tagged", "fired", "preactivations", "tag",
    "why_untagged",
]  # fmt: skip
