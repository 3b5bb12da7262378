"""What one kernel, compiled for one GPU, needs of it."""

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KB = 1024
# Shared memory that a block may have: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"; LDS in AMD's ISA manuals of CDNA 3 and CDNA 4.
SHARED_LIMITS = {
    "sm_80": 163 * KB,
    "sm_90": 227 * KB,
    "sm_100": 227 * KB,
    "sm_120": 99 * KB,
    "gfx942": 64 * KB,
    "gfx950": 160 * KB,
}
# By what a GPU multiplies matrices of 16-bit numbers at full speed. sm_90 and sm_100 have mma.sync too, but
# it reaches only a part of it.
MATRIX = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx942": "v_mfma",
    "gfx950": "v_mfma",
}


@dataclass(frozen=True)
class Usage:
    """Registers a thread, bytes of shared memory a block, and bytes of stack or scratch memory a thread.

    And by which instructions it multiplies matrices of 16-bit numbers, if it does; see matrix_instructions.
    """

    registers: int
    shared: int
    spilled: int
    matrix: str = ""

    def complaints(self, target: str) -> Iterator[str]:
        """What of this the kernel may not have on a GPU."""
        if self.spilled:
            yield f"{self.spilled} bytes a thread are spilled (with {self.registers} registers)"
        limit = SHARED_LIMITS.get(target, 48 * KB)  # every GPU has that much
        if self.shared > limit:
            yield f"{self.shared} bytes of shared memory, {target} has {limit}"
        if self.matrix and self.matrix != MATRIX[target]:
            yield f"products of 16-bit matrices by {self.matrix}, {target} has {MATRIX[target]}"


def cuobjdump(*places: Path) -> Path | None:
    """NVIDIA's tool that reads cubins, beside nvcc or in one of the places given."""
    nvcc = shutil.which("nvcc")
    beside = [Path(nvcc).resolve().parent] if nvcc else []
    packaged = Path(sysconfig.get_paths()["purelib"]) / "triton" / "backends" / "nvidia" / "bin"
    found = (folder / "cuobjdump" for folder in (*beside, *places, packaged))
    return next((path for path in found if path.exists()), None)


def of_cuda_binary(binary: Path, tool: Path, target: str = "") -> Iterator[tuple[str, str, Usage]]:
    """Target, mangled name and usage of every kernel of a library, or of a cubin, which has no target in it.

    Shared memory is what is declared in the kernel, not what a launch adds.
    """
    done = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump could not read {binary}: {done.stderr or done.stdout}")
    name = ""
    for line in done.stdout.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            target = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif line.lstrip().startswith("REG:"):
            number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            reserved = (
                KB if number["SHARED"] and int(target[3:]) >= 90 else 0
            )  # by CUDA, and counted since Hopper
            yield (
                target,
                name,
                Usage(number["REG"], number["SHARED"] - reserved, number["STACK"] + number["LOCAL"]),
            )


def with_a_stack(binary: Path, tool: Path, target: str) -> set[str]:
    """Mangled names of the kernels whose machine code for a target reads or writes memory of a thread's own.

    That finds what has no size before it runs, as of recursion and alloca, which count as 0 bytes above.
    """
    command = [tool, "-sass", "-arch", target, binary]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = code.split("Function : ")[1:]
    return {kernel.split(maxsplit=1)[0] for kernel in kernels if " LDL" in kernel or " STL" in kernel}


def of_amd_assembly(assembly: str) -> Usage:
    """Usage of the one kernel in AMD's assembly; VGPRs, matrix accumulators included, are its registers.

    What a kernel has no VGPRs for is moved to scratch memory, 4 bytes a lane each.
    """

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])

    spilled = max(number("private_segment_fixed_size"), 4 * number("vgpr_spill_count"))
    return Usage(number("vgpr_count"), number("group_segment_fixed_size"), spilled)


def matrix_instructions(ttir: str, assembly: str) -> str:
    """By what the assembly multiplies 16-bit matrices; empty if Triton's own code has no such product."""
    if not re.search(r"\btt\.dot .*: tensor<[\dx]+xb?f16> \*", ttir):
        return ""
    names = re.findall(r"\b(mma\.sync|wgmma|tcgen05\.mma|v_mfma)[\w.:]*[_.:]b?f16(?![a-z\d])", assembly)
    return " and ".join(sorted(set(names))) or "no matrix instruction"
