"""Runs Triton kernels under Triton's interpreter, made to compute as a GPU does and to check every address.

The interpreter must be chosen, by TRITON_INTERPRET=1, before Triton is imported: conftest.py does so where
there is no GPU.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch


def unavailable() -> str | None:
    """Why kernels can't be interpreted here, if so."""
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return "triton is not installed"
    if tuple(map(int, installed.split(".")[:2])) < (3, 9):
        return (
            f"the interpreter of triton {installed} doesn't work with NumPy 2.4 and later; that of 3.9 does"
        )
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton compiles for the GPU here: TRITON_INTERPRET=1 would choose its interpreter"
    return None


@contextmanager
def interpreting() -> Iterator[None]:
    """Interpret the kernels that are launched in the block."""
    import numpy as np
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", _exact_casts())
        patch.setattr(interpreter.ScanOps, "generic_scan", _scan)
        _check_addresses(patch)
        patched = _PatchedOnce()
        patch.setattr(interpreter, "_patch_lang", patched)
        # NumPy stands in for a GPU, which says nothing of an overflow.
        with np.errstate(all="ignore"):
            try:
                yield
            finally:
                patched.undo()


def _exact_casts():
    """The interpreter's cast, but exact between fp32 and bf16.

    Its own cuts bits off where it should round to nearest, and loses subnormal numbers.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_impl(builder, source, target):
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16)
            return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            wide = np.array(source.data).astype(np.uint32) << 16
            return TensorHandle(wide.view(np.float32), tl.float32)
        return cast(builder, source, target)

    return cast_impl


def _scan(operation, inputs: list) -> list:
    """The interpreter's scan, but of whole slices at once, where its own calls Python for every element.

    It takes log2 of their number passes (Hillis & Steele 1986); the operation must be associative.
    """
    import numpy as np

    types, axis = [tensor.dtype for tensor in inputs], operation.axis

    def tensors(parts: list) -> list:
        return [operation.to_tensor(np.ascontiguousarray(p), t) for p, t in zip(parts, types, strict=True)]

    found = [tensor.handle.data for tensor in inputs]
    place, reach = np.indices(found[0].shape)[axis], 1
    while reach < found[0].shape[axis]:
        earlier = tensors([np.roll(part, reach, axis) for part in found])
        joined = operation.combine_fn.fn(*earlier, *tensors(found))
        joined = joined if isinstance(joined, tuple) else (joined,)
        pairs = zip(found, joined, strict=True)
        found = [np.where(place < reach, part, tensor.handle.data) for part, tensor in pairs]
        reach *= 2
    return tensors(found)


def _check_addresses(patch: pytest.MonkeyPatch) -> None:
    """Let the interpreter raise where a kernel reads or writes outside the memory of its arguments."""
    import numpy as np
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    begins = ends = np.empty(0, np.uint64)
    kernel = ""
    receive = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def launched(executor, arguments, named):
        nonlocal begins, ends, kernel
        kernel = executor.fn.__name__
        tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
        storages = sorted((t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors)
        begins = np.array([begin for begin, _ in storages], np.uint64)
        ends = np.array([begin + size for begin, size in storages], np.uint64)
        return receive(executor, arguments, named)

    def check(pointers, mask, access: str) -> None:
        addresses = pointers.data[mask.data.astype(bool)]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        place = np.searchsorted(begins, addresses, side="right") - 1
        outside = (place < 0) | (addresses + np.uint64(size) > np.append(ends, np.uint64(0))[place])
        if outside.any():
            raise IndexError(
                f"{kernel} {access} outside its arguments: {outside.sum()} of {outside.size} addresses"
            )

    def checked_load(builder, pointers, mask, *rest):
        check(pointers, mask, "reads")
        return load(builder, pointers, mask, *rest)

    def checked_store(builder, pointers, value, mask, *rest):
        check(pointers, mask, "writes")
        return store(builder, pointers, value, mask, *rest)

    patch.setattr(GridExecutor, "_init_args_hst", launched)
    patch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    patch.setattr(InterpreterBuilder, "create_masked_store", checked_store)


class _PatchedOnce:
    """The interpreter's ``_patch_lang``, which turns triton.language into NumPy, done once.

    The interpreter does it again for every call of every jitted function, which takes a third of its time.
    """

    def __init__(self) -> None:
        from triton.runtime import interpreter

        self._patch = interpreter._patch_lang
        self._scopes = {}

    def __call__(self, function) -> "_PatchedOnce":
        import triton.language as tl

        seen = {id(value) for value in function.__globals__.values()}
        languages = id(tl) in seen, id(tl.core) in seen
        if languages not in self._scopes:
            self._scopes[languages] = self._patch(function)
        return self

    def restore(self) -> None:
        """What the interpreter calls after a launch: nothing yet."""

    def undo(self) -> None:
        for languages in reversed(list(self._scopes)):
            self._scopes.pop(languages).restore()
