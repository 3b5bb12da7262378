"""Runs the kernels of probes.cu on the emulator."""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
from cuda_emulation import build as emulator

SOURCE = emulator.HERE / "probes.cu"


def build_probes(variant: str) -> Path:
    """The probes' library in one variant."""
    return emulator.build("probes", [SOURCE], variant)


class Machine:
    """The probes, in one variant of the emulator."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self._run = ctypes.CDLL(str(build_probes(variant))).run_probe
        self._run.restype = ctypes.c_char_p

    def run(self, probe, words=(), out=0, *, grid=1, block=32, shared=0, a=0, b=0, c=0) -> np.ndarray:
        """What a probe leaves in ``out`` words; RuntimeError with the emulator's message."""
        triples = [(ctypes.c_uint * 3)(*_triple(size)) for size in (grid, block)]
        words = np.ascontiguousarray(words, dtype=np.uint64)
        result = np.zeros(out, dtype=np.uint64)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (words, result)]
        numbers = [ctypes.c_int64(number) for number in (a, b, c)]
        message = self._run(probe.encode(), *triples, ctypes.c_uint64(shared), *pointers, *numbers)
        if message is not None:
            raise RuntimeError(message.decode())
        return result


def _triple(size) -> tuple[int, int, int]:
    return (*((size,) if isinstance(size, int) else size), 1, 1)[:3]


if __name__ == "__main__":  # calls of Machine.run, which fail where they say so
    machine = Machine("address")
    for probe, words, out, options in json.loads(sys.argv[1]):
        fails = options.pop("fails", False)
        try:
            machine.run(probe, words, out, **options)
        except RuntimeError:
            if not fails:
                raise
