"""Who runs a call of an op: the backend, by its name.

It is asked where an op is called, with tensors that are there: of CUDA tensors in every call (_gpu.py), of
others where no library has added a kernel (_library.py). Where one has, PyTorch's dispatcher goes there and
doesn't ask, which is the same answer. What the public functions call has before that gone to the reference,
if that was named, and refused tensors that a named backend isn't for (backend.wants_reference): that part
torch.compile traces.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastsparse.backend import DEVICES

if TYPE_CHECKING:
    from fastsparse.ops._library import Op


def choose(op: "Op", device: str, requested: str | None, failure: Callable[[str], str | None]) -> str:
    """The backend that runs an op on a type of device.

    Args:
        op: its record.
        device: ``"cpu"``, ``"cuda"``, or what else PyTorch calls one.
        requested: the backend that was asked for, if one was.
        failure: why a backend can't run here, None where it can.

    Returns:
        What was asked for, else the first of the op's kernels that can run, else ``"reference"``.

    Raises:
        RuntimeError: what was asked for can't run.
    """
    if requested == "reference":
        return requested
    if requested is None:
        kernels = (name for name in op.kernels if DEVICES[name] == device and failure(name) is None)
        return next(kernels, "reference")
    if DEVICES[requested] != device:
        reason = f"it runs on {DEVICES[requested]} tensors"
    elif requested not in op.kernels:
        reason = "it has no kernel for this op"
    else:
        reason = failure(requested)
    if reason is not None:
        raise RuntimeError(f"{op.name}: backend {requested!r} was asked for and can't run here: {reason}")
    return requested
