"""What puts our ops under a library, and takes them away again: whole or not at all."""

import hashlib
import importlib
import inspect
import re
import sys
import threading
import types
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastsparse._transforms import is_traced
from fastsparse._validation import check_count, named

_TORCH = Path(torch.__file__).parent
ON_REFUSE = ("fallback", "warn", "raise")
LEAST_WORK = 1 << 24  # N D M: some milliseconds of a dense product


class RefusedError(Exception):
    """Raised by a replacement, before it does anything: the library's own code has to serve, and why."""


@dataclass(frozen=True)
class Site:
    """A function of a library that is replaced.

    Attributes:
        module: where it is defined.
        name: in there, ``"function"`` or ``"Class.method"``.
        digest: of its source in the release that was tested, as :func:`digest_of` gives it.
        replacement: takes the original, then the arguments.
        optional: whether it is left out where its module needs packages that aren't installed.
    """

    module: str
    name: str
    digest: str
    replacement: Callable
    optional: bool = False

    @property
    def label(self) -> str:
        return f"{self.module}.{self.name}"

    def owner(self) -> Any:
        """The module or class that has it as an attribute."""
        owner = importlib.import_module(self.module)
        for part in self.name.split(".")[:-1]:
            owner = getattr(owner, part)
        return owner

    @property
    def attribute(self) -> str:
        return self.name.split(".")[-1]

    def is_left_out(self) -> bool:
        """Whether its module can't be imported for want of others, and needn't be."""
        try:
            importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            own = self.module.split(".")[0]
            if not self.optional or (error.name or own).split(".")[0] == own:
                raise
            return True
        return False


@dataclass
class Status:
    """What has become of a library.

    Attributes:
        library: its name.
        version: which release is installed; None if none is.
        applied: whether our ops are under it.
        served: how many calls of each site our ops have served.
        refused: how many went to the library's own code, by site and reason.
    """

    library: str
    version: str | None
    applied: bool
    served: Counter[str] = field(default_factory=Counter)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        state = "applied" if self.applied else "not applied"
        lines = [f"{self.library} {self.version or '(no release)'}: {state}"]
        lines += [f"  {count:>8}  served   {site}" for site, count in sorted(self.served.items())]
        lines += [
            f"  {count:>8}  refused  {site}: {why}" for (site, why), count in sorted(self.refused.items())
        ]
        return "\n".join(lines)


class Library:
    """A library that people train with, and what of it is replaced.

    Args:
        name: as it is imported.
        distribution: as it is installed; None if it isn't released.
        versions: the least release that is served, and the least that isn't.
        sites: what is replaced.
        options: what :meth:`apply` may be asked for beside, and what is replaced only then.
        repository: of one that isn't released: there what is served is told by the digests alone.

    Attributes:
        least_work: multiplications of a dense encoder below which the library's own code is as fast.
        chosen: those of the options that are asked for.
    """

    def __init__(
        self,
        name: str,
        distribution: str | None,
        versions: tuple[str, str] | None,
        sites: Sequence[Site],
        options: Mapping[str, Sequence[Site]] | None = None,
        *,
        repository: str | None = None,
    ) -> None:
        self.name, self.distribution, self.versions, self.sites = name, distribution, versions, tuple(sites)
        self.options, self.repository = dict(options or {}), repository
        self.least_work = LEAST_WORK
        self.chosen: frozenset[str] = frozenset()
        self._lock = threading.RLock()
        self._on_refuse = ON_REFUSE[0]
        self._patched: dict[Site, tuple[Callable, Callable]] = {}  # originals and what replaces them
        self._served: Counter[str] = Counter()
        self._refused: Counter[tuple[str, str]] = Counter()

    # What users call.

    def apply(
        self,
        *,
        on_refuse: str = "fallback",
        least_work: int = LEAST_WORK,
        force: bool = False,
        **options: bool,
    ) -> "Library":
        """Put our ops under the library, until :meth:`undo` or the end of a ``with`` block.

        Args:
            on_refuse: what becomes of calls that only the library's own code can serve: ``"fallback"`` to it,
                ``"warn"`` (once a reason) and fall back, or ``"raise"`` a RuntimeError.
            least_work: calls of fewer multiplications, N D M of a dense encoder, go to the library's own
                code, which is as fast there.
            force: also take a release that wasn't tested, or one whose functions have another source.
            options: what this library's module says that it has beside these, such as ``relayout=True``.

        Returns:
            What ``with`` takes: at its end all is undone.

        Raises:
            ModuleNotFoundError: the library is not installed.
            RuntimeError: it is of another release, patched already, by us or others, or being traced.
            ValueError, TypeError: an option is none.
        """
        if on_refuse not in ON_REFUSE:
            raise ValueError(
                f"{self.name}: on_refuse must be one of {', '.join(ON_REFUSE)}, got {on_refuse!r}"
            )
        if not isinstance(force, bool):
            raise TypeError(f"{self.name}: force must be a bool, got {named(force)}")
        least_work = check_count(self.name, "least_work", least_work, 0)
        chosen = self._chosen(options)
        with self._lock:
            self._refuse_while_traced("apply")
            if self._patched:
                raise RuntimeError(f"{self.name}: our ops are under it already: undo() comes first")
            self._check_version(force)
            found = {site: self._original(site, force) for site in self._wanted(chosen)}
            self._on_refuse, self.least_work, self.chosen = on_refuse, least_work, chosen
            self._patched = {
                site: (original, self._serving(site, original)) for site, original in found.items()
            }
            for site, (original, ours) in self._patched.items():
                self._exchange(site, original, ours)
        return self

    def undo(self) -> None:
        """Put back what was there before :meth:`apply`; nothing where it wasn't called.

        Raises:
            RuntimeError: someone has patched over us: what came last has to go first.
        """
        with self._lock:
            self._refuse_while_traced("undo")
            for site, (_, ours) in self._patched.items():
                if vars(site.owner()).get(site.attribute) is not ours:
                    raise RuntimeError(
                        f"{self.name}: {site.label} was patched by others after us: theirs goes first"
                    )
            for site, (original, ours) in self._patched.items():
                self._exchange(site, ours, original)
            self._patched = {}

    def convert(self, module: torch.nn.Module) -> torch.nn.Module:
        """Put our ops under one module and what it is made of, for good; returns it.

        Raises:
            TypeError: no class of the library that we know.
            RuntimeError: as :meth:`apply`.
        """
        self._check_version(force=False)
        parts = module.modules() if isinstance(module, torch.nn.Module) else (module,)
        sites = self._wanted(frozenset())
        # Of a method that a subclass defines anew, its own alone.
        methods = [
            (part, site)
            for part in parts
            for site in sites
            if "." in site.name
            and isinstance(part, site.owner())
            and getattr(type(part), site.attribute) is self._current(site)
        ]
        if not methods:
            raise TypeError(f"{self.name}: module must be of a class that is served, got {named(module)}")
        for part, site in methods:
            original = self._patched[site][0] if site in self._patched else self._original(site, force=False)
            ours = self._serving(site, original)
            object.__setattr__(part, site.attribute, types.MethodType(ours, part))
        return module

    def status(self) -> Status:
        """What is patched, how often it served, and why it didn't."""
        return Status(
            self.name, self._version(), bool(self._patched), Counter(self._served), Counter(self._refused)
        )

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *_) -> None:
        self.undo()

    def is_imported(self) -> bool:
        """Whether it is there to be patched, and not another by its name."""
        return self.name in sys.modules

    # What replacements ask.

    def refuse_unless_worth(
        self, x: torch.Tensor, num_latents: int, k: float | None = None, gpu_only: bool = False
    ) -> None:
        """Refuse what a dense encoder of x (..., D) does as fast: little work, codes that aren't sparse.

        On CPUs no work is too little for us where the library's own code runs on GPUs alone, ``gpu_only``.
        """
        if not isinstance(x, torch.Tensor):
            raise RefusedError("not a tensor")
        if k is not None and k > num_latents / 4:
            raise RefusedError("k > M / 4")
        if x.numel() * num_latents < self.least_work and (x.is_cuda or not gpu_only):
            raise RefusedError("little work")

    # How.

    def _chosen(self, options: Mapping[str, bool]) -> frozenset[str]:
        for name, given in options.items():
            if name not in self.options:
                known = "on_refuse", "least_work", "force", *self.options
                raise TypeError(
                    f"{self.name}: apply() has no option {name}: it must be one of {', '.join(known)}"
                )
            if not isinstance(given, bool):
                raise TypeError(f"{self.name}: {name} must be a bool, got {named(given)}")
        return frozenset(name for name, given in options.items() if given)

    def _wanted(self, chosen: frozenset[str]) -> list[Site]:
        """What is there of it; each once, whichever options want it."""
        sites = dict.fromkeys([*self.sites, *(site for name in chosen for site in self.options[name])])
        return [site for site in sites if not site.is_left_out()]

    def _version(self) -> str | None:
        if self.distribution is None:
            return None
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None

    def _check_version(self, force: bool) -> None:
        if self.distribution is None:
            self._check_import()
            return
        version = self._version()
        if version is None:
            raise ModuleNotFoundError(
                f"{self.name}: {self.distribution} is not installed: pip install {self.distribution}",
                name=self.name,
            )
        least, beyond = self.versions
        if not force and not _numbers(least) <= _numbers(version) < _numbers(beyond):
            raise RuntimeError(
                f"{self.name}: release must be at least {least} and below {beyond}, got {version}: "
                "force=True tries it"
            )

    def _check_import(self) -> None:
        try:
            importlib.import_module(self.name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{self.name}: it can't be imported ({error}): a clone of {self.repository} must be where "
                "Python looks for modules",
                name=self.name,
            ) from error

    def _original(self, site: Site, force: bool) -> Callable:
        try:
            original = vars(site.owner())[site.attribute]
        except (KeyError, AttributeError) as error:
            raise RuntimeError(
                f"{self.name}: {site.label} is not there in {self._version() or 'what is imported'}"
            ) from error
        if getattr(original, "_fastsparse", False):
            raise RuntimeError(f"{self.name}: our ops are under {site.label} already: undo() comes first")
        if not force and digest_of(original) != site.digest:
            raise RuntimeError(
                f"{self.name}: {site.label} isn't what was tested: it was patched by others, or changed in "
                f"{self._version() or 'what is imported'}: force=True tries it"
            )
        return original

    def _current(self, site: Site) -> Callable:
        return vars(site.owner())[site.attribute]

    def _serving(self, site: Site, original: Callable) -> Callable:
        """What stands in for the original."""
        replacement = site.replacement

        @wraps(original)
        def serve(*args, **kwargs):
            # What traces, runs without data or batches does so with the library's own code.
            if is_traced() or torch._C._functorch.peek_interpreter_stack() is not None:
                return original(*args, **kwargs)
            try:
                result = replacement(original, *args, **kwargs)
            except RefusedError as refusal:
                self._told(site, str(refusal))
                return original(*args, **kwargs)
            self._served[site.label] += 1
            return result

        serve._fastsparse = True
        return serve

    def _told(self, site: Site, why: str) -> None:
        known = (site.label, why) in self._refused
        self._refused[site.label, why] += 1
        message = f"{self.name}: {site.label} is served by the library's own code: {why}"
        if self._on_refuse == "raise":
            raise RuntimeError(message)
        if self._on_refuse == "warn" and not known:
            warnings.warn(message, stacklevel=4)

    def _exchange(self, site: Site, old: Callable, new: Callable) -> None:
        """Wherever the library has the one, put the other: also where it was imported by name."""
        setattr(site.owner(), site.attribute, new)
        if "." in site.name:
            return
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == self.name and isinstance(module, types.ModuleType):
                for attribute, value in list(vars(module).items()):
                    if value is old:
                        setattr(module, attribute, new)

    def _refuse_while_traced(self, what: str) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{self.name}: {what}() can't be called while a model is being traced")


def digest_of(function: Callable) -> str:
    """What tells one source of a function from another: of its own code, not of what it wraps.

    But PyTorch's decorators, as ``@torch.no_grad()``, are looked through.
    """
    if isinstance(function, staticmethod | classmethod):
        function = function.__func__
    while hasattr(function, "__wrapped__") and Path(function.__code__.co_filename).is_relative_to(_TORCH):
        function = function.__wrapped__
    try:
        source = inspect.getsource(function.__code__)
    except (OSError, AttributeError):
        return "unknown"
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])
