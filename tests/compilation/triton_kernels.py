"""Compile the specimens of Triton kernels for every GPU, in a process of its own and without the interpreter.

    python -m tests.compilation.triton_kernels CACHE MODULE...

prints a list of records as JSON. Each compilation is a child process, because a compiler may abort; its
record is kept in the folder CACHE under a hash of all that went into it, its key.
"""

import dataclasses
import hashlib
import importlib
import inspect
import json
import os
import re
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .usage import SHARED_LIMITS, Usage, cuobjdump, of_amd_assembly, of_cuda_binary

CPU_SECONDS = 120  # that one compilation may take: most take one or two


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One specimen for one target."""

    name: str
    target: str
    source: ASTSource
    options: dict

    @property
    def key(self) -> str:
        """A hash of all that the outcome depends on."""
        parts = (triton.__version__, self.target, self.source.hash(), sorted(self.options.items()))
        reader = inspect.getsource(usage) + Path(__file__).with_name("usage.py").read_text()
        return hashlib.sha256((repr(parts) + reader).encode()).hexdigest()[:16]


def specimens(module_name: str) -> Iterator[Job]:
    """The jobs of a module's ``specimens()``: (name, kernel, signature, constexprs, options) each.

    ``:16`` after a type of the signature says, as in Triton's own ahead-of-time compiler, that the argument
    is a multiple of 16.
    """
    module = importlib.import_module(module_name)
    named = set()
    for name, kernel, signature, constexprs, options in module.specimens():
        kernel = _unwrapped(kernel)
        named.add(kernel)
        types = {argument: kind.removesuffix(":16") for argument, kind in signature.items()}
        types |= dict.fromkeys(constexprs, "constexpr")
        if set(types) != set(kernel.arg_names):
            raise ValueError(
                f"{module_name}: specimen {name}: {set(types) ^ set(kernel.arg_names)} in one of both"
            )
        types = {argument: types[argument] for argument in kernel.arg_names}
        attributes = {
            (kernel.arg_names.index(argument),): [["tt.divisibility", 16]]
            for argument, kind in signature.items()
            if kind.endswith(":16")
        }
        source = ASTSource(kernel, types, constexprs, attributes)
        for target in SHARED_LIMITS:
            yield Job(f"{module_name.rpartition('.')[2]}: {name}", target, source, options)
    _check_that_no_kernel_is_left_out(module, named)


def _unwrapped(kernel) -> JITFunction:
    while not isinstance(kernel, JITFunction):  # under autotune and heuristics
        kernel = kernel.fn
    return kernel


def _check_that_no_kernel_is_left_out(module, named: set) -> None:
    """Every jitted function of the module, and of those that its specimens are from, is one or serves one."""
    modules = {module.__name__, *(kernel.__module__ for kernel in named)}
    found = [vars(sys.modules[name]).values() for name in sorted(modules)]
    jitted = [value for values in found for value in values if hasattr(value, "fn") and hasattr(value, "run")]
    own = {kernel for kernel in map(_unwrapped, jitted) if kernel.__module__ in modules}
    for kernel in own - named:
        name = kernel.__name__
        if not any(re.search(rf"\b{name}\b", other.src) for other in own - {kernel}):
            raise ValueError(f"{kernel.__module__}: {name} is no specimen, and no kernel uses it")


def gpu(target: str) -> GPUTarget:
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), 32)
    return GPUTarget("hip", target, 64)


def usage(job: Job) -> Usage:
    """Compile."""
    binary = triton.compile(job.source, target=gpu(job.target), options=job.options)
    if "cubin" not in binary.asm:
        found = of_amd_assembly(binary.asm["amdgcn"])
    else:
        tool = cuobjdump(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            ((_, _, found),) = of_cuda_binary(Path(file.name), tool, job.target)
    # Triton's kernels have all their shared memory from the launch.
    return dataclasses.replace(found, shared=max(found.shared, binary.metadata.shared))


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
    records = {job: cache / f"{job.key}.json" for job in jobs}
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


def main(cache: str, *modules: str) -> None:
    jobs = [job for module in modules for job in specimens(module)]
    names = {(job.name, job.target) for job in jobs}
    if len(names) < len(jobs):
        raise ValueError("two specimens have one name")
    records = compile_all(jobs, Path(cache), len(os.sched_getaffinity(0)))
    print(json.dumps(records))


if __name__ == "__main__":
    main(*sys.argv[1:])
