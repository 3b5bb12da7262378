"""What calls launch, found out by calling: no kernel runs, and no GPU is there.

The tensors have no memory. Triton specialises every launch as it would for the GPU that a driver without one
claims, and is stopped where it would compile.
"""

import pkgutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, combinations
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel as one call launches it on one GPU: all that a compiler is told."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, Any]

    @property
    def source(self) -> ASTSource:
        return ASTSource(self.kernel, self.signature, self.constants, self.attributes)

    @property
    def facts(self) -> dict[str, str]:
        """In words: the options, and every argument's value or type, with ``:16`` where 16 divides it."""
        names = self.kernel.arg_names
        facts = {name: str(value) for name, value in self.options.items()}
        facts |= {names[place]: str(value) for (place,), value in self.constants.items()}
        even = {
            names[place] for (place,), known in self.attributes.items() if ["tt.divisibility", 16] in known
        }
        types = ((name, f"{kind}:16" if name in even else kind) for name, kind in self.signature.items())
        return facts | {name: kind for name, kind in types if name not in facts}


class Machine:
    """What a launch asks of Triton's driver."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target  # what is kept for a device is kept for a kind of GPU

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


def of(call: Callable[[], Any], target: GPUTarget) -> list[Launch]:
    """What a call launches on a GPU."""
    found: list[Launch] = []
    options: dict[str, Any] = {}
    launch = JITFunction.run

    def run(kernel: JITFunction, *arguments: Any, **keywords: Any) -> Any:
        own = ("grid", "warmup", *kernel.arg_names)
        options.clear()
        options.update((name, value) for name, value in keywords.items() if name not in own)
        return launch(kernel, *arguments, **keywords)

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        parts = compile["signature"], compile["constants"], compile["configs"][0], options
        found.append(Launch(fn.jit_function, *map(dict, parts)))
        return True  # or it would be compiled

    JITFunction.run, triton.knobs.runtime.jit_cache_hook = run, note
    driver.set_active(Machine(target))
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    try:
        call()
    finally:
        JITFunction.run, triton.knobs.runtime.jit_cache_hook = launch, None
    return found


def of_all(calls: Iterable[tuple[str, str, Callable[[], Any]]], target: GPUTarget) -> dict[str, Launch]:
    """What (group, label, call) launch, each once, by group, kernel, label, and what tells them apart."""
    groups: dict[str, list[Launch]] = defaultdict(list)
    seen = set()
    for group, label, call in calls:
        for launch in of(call, target):
            kind = launch.kernel, *launch.facts.items()
            if kind not in seen:
                seen.add(kind)
                groups[f"{group}: {launch.kernel.__name__.strip('_')}, {label}"].append(launch)
    return {f"{name}{told}": launch for name, alike in groups.items() for told, launch in _told_apart(alike)}


def _told_apart(launches: list[Launch]) -> Iterable[tuple[str, Launch]]:
    """Each with the fewest facts that no two of them share."""
    facts = [launch.facts for launch in launches]
    choices = chain.from_iterable(combinations(facts[0], size) for size in range(len(facts[0])))
    told = next(c for c in choices if len({tuple(f[name] for name in c) for f in facts}) == len(facts))
    return [
        ("".join(f", {name} = {own[name]}" for name in told), launch)
        for own, launch in zip(facts, launches, strict=True)
    ]


def load(module: str) -> list[JITFunction]:
    """Every kernel, and every part of one, of a module, or of all modules of a package.

    Where it stands in its file is forgotten, for that is no part of what is compiled.
    """
    names = [module]
    for found in pkgutil.iter_modules(getattr(import_module(module), "__path__", ())):
        names.append(f"{module}.{found.name}")
        import_module(names[-1])
    values = {id(value): value for name in names for value in vars(sys.modules[name]).values()}
    kernels = [value for value in values.values() if isinstance(value, JITFunction)]
    for kernel in kernels:
        kernel.starting_line_number = 0
    return [kernel for kernel in kernels if kernel.__module__ in names]


def idle(kernels: list[JITFunction], launches: Iterable[Launch]) -> list[str]:
    """The kernels that nothing launches and no other one uses."""
    launched = {launch.kernel for launch in launches}
    used = set().union(*(kernel.fn.__code__.co_names for kernel in kernels))
    return [k.__name__ for k in kernels if k not in launched and k.__name__ not in used]
