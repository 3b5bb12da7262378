"""Compile Triton's kernels as calls launch them, in a process of its own and without the interpreter.

    python -m tests.compilation.triton_kernels PACKAGE CALLS VENDOR          list what is launched
    python -m tests.compilation.triton_kernels PACKAGE CALLS VENDOR CACHE    compile what is read from stdin

PACKAGE holds the kernels, CALLS is a module whose ``calls()`` call them. What is listed has a key, a hash of
all that goes into a compilation but the version of Triton. Each compilation is a child process, because a
compiler may abort; its record is kept in the folder CACHE.
"""

import dataclasses
import hashlib
import inspect
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from . import launches
from .launches import Launch
from .usage import SHARED_LIMITS, Usage, cuobjdump, matrix_instructions, of_amd_assembly, of_cuda_binary

CPU_SECONDS = 120  # that one compilation may take: most take one or two


@dataclasses.dataclass(frozen=True)
class Job:
    """One launch for one target."""

    name: str
    target: str
    launch: Launch

    @property
    def key(self) -> str:
        reader = inspect.getsource(usage) + Path(__file__).with_name("usage.py").read_text()
        told = sorted(self.launch.facts.items()), sorted(self.launch.attributes.items())
        parts = self.launch.kernel.cache_key, told, self.target, reader
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def jobs(package: str, calls: str, vendor: str) -> list[Job]:
    """Everything that is launched, for every target of a vendor."""
    if vendor == "amd":
        torch.version.hip = "none"  # what the kernels ask before they choose a layout
    kernels = launches.load(package)
    targets = [target for target in SHARED_LIMITS if target.startswith("gfx" if vendor == "amd" else "sm")]
    named = launches.of_all(import_module(calls).calls(), gpu(targets[0]))  # all of a vendor's launch alike
    if idle := launches.idle(kernels, named.values()):
        raise ValueError(f"{package}: no call launches {', '.join(idle)}, and no kernel uses it")
    return [Job(name, target, launch) for name, launch in named.items() for target in targets]


def gpu(target: str) -> GPUTarget:
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), 32)
    return GPUTarget("hip", target, 64)


def usage(job: Job) -> Usage:
    """Compile."""
    binary = triton.compile(job.launch.source, target=gpu(job.target), options=job.launch.options)
    if "cubin" not in binary.asm:
        found = of_amd_assembly(binary.asm["amdgcn"])
    else:
        tool = cuobjdump(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            ((_, _, found),) = of_cuda_binary(Path(file.name), tool, job.target)
    assembly = binary.asm["ptx" if "ptx" in binary.asm else "amdgcn"]
    # Triton's kernels have all their shared memory from the launch.
    return dataclasses.replace(
        found,
        shared=max(found.shared, binary.metadata.shared),
        matrix=matrix_instructions(binary.asm["ttir"], assembly),
    )


def _compile(job: Job, record: Path, log: Path) -> None:
    """In a child process: leave a record, and in the log all that the compiler says."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            found = dataclasses.asdict(usage(job))
        except Exception:
            traceback.print_exc()
            sys.exit(1)
    draft = record.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(found))
    draft.replace(record)


def compile_all(jobs: list[Job], cache: Path, processes: int) -> list[dict]:
    """A record of every job, ``processes`` of them at once: name, target, key, and usage or error."""
    cache.mkdir(parents=True, exist_ok=True)
    records = {job: cache / f"{triton.__version__}-{job.key}.json" for job in jobs}
    waiting = [job for job in jobs if not records[job].exists()]
    errors, running = {}, {}
    context = get_context("fork")
    while waiting or running:
        while waiting and len(running) < processes:
            job = waiting.pop(0)
            log = records[job].with_suffix(f".{os.getpid()}.log")
            child = context.Process(target=_compile, args=(job, records[job], log))
            child.start()
            running[child.sentinel] = job, child, log
        for sentinel in wait(list(running)):
            job, child, log = running.pop(sentinel)
            child.join()
            said = log.read_text(errors="replace").strip().splitlines()
            log.unlink()
            if child.exitcode:
                why = signal.Signals(-child.exitcode).name if child.exitcode < 0 else "an error"
                errors[job] = "\n".join([f"the compiler ended with {why}", *said[-30:]])
    return [
        {"name": job.name, "target": job.target, "key": job.key}
        | ({"error": errors[job]} if job in errors else json.loads(records[job].read_text()))
        for job in jobs
    ]


def main(package: str, calls: str, vendor: str, cache: str | None = None) -> None:
    found = jobs(package, calls, vendor)
    if cache is None:
        print(json.dumps([{"name": job.name, "target": job.target, "key": job.key} for job in found]))
        return
    of = {(job.name, job.target): job for job in found}
    wanted = [of[name, target] for name, target in json.load(sys.stdin)]
    print(json.dumps(compile_all(wanted, Path(cache), len(os.sched_getaffinity(0)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
