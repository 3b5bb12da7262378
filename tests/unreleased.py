"""Libraries that have no release: what stands in for them, and a checkout where one is given.

FASTSPARSE_CHECKOUTS is a folder of checkouts, one a library by the name of its adapter. Without it what the
adapters patch is compat/standins: our own code of the stated signatures, which is what they are compared with
in either case.
"""

import contextlib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest

STANDINS = Path(__file__).parent / "compat" / "standins"


class Unreleased(NamedTuple):
    """A library twice, each by the names of its modules.

    Attributes:
        adapter: ours.
        dense: what stands in for it, never patched where there is a checkout.
        tested: the checkout, or the same.
        is_checkout: whether it is one.
    """

    adapter: ModuleType
    dense: SimpleNamespace
    tested: SimpleNamespace
    is_checkout: bool

    @contextmanager
    def imported(self) -> Iterator[None]:
        """While the block runs, the one that is tested is what is imported by its name."""
        with _absent(self.tested.package):
            sys.modules.update(self.tested.all)
            yield

    def applied(self, **options) -> AbstractContextManager:
        """Of a checkout its functions must be the ones that were tested; what stands in for it is forced."""
        return self.adapter.apply(**{"least_work": 0, "force": not self.is_checkout} | options)

    def with_and_without(self, run: Callable[[SimpleNamespace], object], on_refuse: str = "raise") -> tuple:
        """What a run gives by dense maths, and by the library with our ops under it."""
        without = run(self.dense)
        with self.applied(on_refuse=on_refuse):
            return without, run(self.tested)

    def assert_told_by_its_functions(self) -> None:
        """A checkout is served unforced; what only stands in for one, of other source, is not."""
        if self.is_checkout:
            with self.adapter.apply():
                assert self.adapter.status().applied
            return
        told = r"isn't what was tested: .* changed in what is imported: force"
        with pytest.raises(RuntimeError, match=told):
            self.adapter.apply()
        assert not self.adapter.status().applied


def unreleased(library: str, package: str, modules: tuple[str, ...]) -> Unreleased:
    """Import both; neither is left where others by that name are looked for."""
    adapter = importlib.import_module(f"fastsparse.compat.{library}")
    dense = _load(STANDINS / library, package, modules)
    checkouts = os.environ.get("FASTSPARSE_CHECKOUTS")
    if not checkouts:
        return Unreleased(adapter, dense, dense, False)
    return Unreleased(adapter, dense, _load(Path(checkouts) / library, package, modules), True)


def _load(folder: Path, package: str, modules: tuple[str, ...]) -> SimpleNamespace:
    if not (folder / package).is_dir():
        raise FileNotFoundError(f"FASTSPARSE_CHECKOUTS: {folder} must hold a checkout with {package}/")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        # Checkouts print what they choose, and warn.
        with _absent(package), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            named = {name: importlib.import_module(f"{package}.{name}") for name in modules}
            return SimpleNamespace(package=package, all=_of(package), **named)
    finally:
        sys.path.remove(str(folder))


@contextmanager
def _absent(package: str) -> Iterator[None]:
    before = _of(package)
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in _of(package):
            del sys.modules[name]
        sys.modules.update(before)


def _of(package: str) -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == package}
