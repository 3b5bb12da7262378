"""What the tests of adapters compare: whatever a library's own code gives, and ours; a library as it was."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

EXACT = 1e-9  # relative to a tensor's largest entry, in double precision
SINGLE = 1e-5
N, D, M, K = 24, 16, 96, 4
STEPS = 200  # of runs that are compared


def tokens(*leading: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(leading or (N,)), D, generator=generator, dtype=torch.float64).to(dtype)


def unpatched(adapter: ModuleType) -> Callable:
    """A fixture: no test leaves an adapter applied, with another bound on work, or what it has counted."""

    @pytest.fixture(autouse=True)
    def undone(monkeypatch) -> Iterator[None]:
        monkeypatch.setattr(adapter.LIBRARY, "least_work", adapter.LIBRARY.least_work)
        yield
        adapter.undo()
        adapter.LIBRARY._served.clear()
        adapter.LIBRARY._refused.clear()

    return undone


def with_and_without(adapter: ModuleType, run: Callable, on_refuse: str = "raise") -> tuple:
    """What a run gives by the library's own code, and by ours."""
    without = run()
    with adapter.apply(least_work=0, on_refuse=on_refuse):
        return without, run()


def refusals(adapter: ModuleType) -> set[str]:
    return {why for _, why in adapter.status().refused}


def served(adapter: ModuleType, name: str) -> int:
    """How many calls of a function, or of methods by this name."""
    return sum(count for site, count in adapter.status().served.items() if site.endswith(f".{name}"))


def assert_refused(adapter: ModuleType, why: str, outcome: Callable[[], object]) -> None:
    """The library's own code serves, and says why: what comes out is its own, or an error if asked for."""
    right = outcome()
    with adapter.apply(least_work=0):
        assert_alike(outcome(), right)
        assert why in refusals(adapter)
    with adapter.apply(least_work=0, on_refuse="raise"):
        kind, message = outcome()
        assert kind == "RuntimeError"
        assert f"served by the library's own code: {why}" in message


def assert_alike(ours, theirs, within: float = EXACT) -> None:
    """Alike in all that a caller can see, and equal but for rounding, relative to the largest entry."""
    if isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor)
        assert ours.shape == theirs.shape
        assert ours.requires_grad == theirs.requires_grad
        ours, theirs = ours.detach().clone(), theirs.detach().clone()
        most = theirs.double().abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=within * most)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert_alike(ours[name], theirs[name], within)
    elif isinstance(theirs, tuple | list):
        assert type(ours) is type(theirs)
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_alike(one, other, within)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=within)
    else:
        assert ours == theirs


def gradients(module: torch.nn.Module) -> dict[str, Tensor | None]:
    """Of every parameter, by name."""
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def in_order(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """A code with the latents of every row in ascending order, since libraries give them in any."""
    indices, order = indices.sort(dim=-1)
    return values.gather(-1, order), indices


def changed_by(library: str, apply: Callable) -> set[str]:
    """What of a library is another as long as ours are under it; afterwards all is as it was."""
    before = attributes(library)
    with apply():
        during = attributes(library)
    after = attributes(library)
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    return {name for name in before if during[name] is not before[name]}


def attributes(library: str) -> dict[str, object]:
    """Every attribute of a library's modules and of their classes, by name."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != library:
            continue
        for attribute, value in list(vars(module).items()):
            if attribute.startswith("__"):
                continue
            found[f"{name}.{attribute}"] = value
            if isinstance(value, type):
                found |= {f"{name}.{attribute}.{own}": it for own, it in list(vars(value).items())}
    return found
