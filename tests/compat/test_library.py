"""What every adapter stands on: patched whole or not at all, refusals told, all of it undone."""

import importlib
import importlib.metadata
import sys
import types
import warnings

import pytest
import torch

from fastsparse import compat
from fastsparse.compat._library import Library, RefusedError, Site, digest_of
from fastsparse.compat._optimizers import fuse_

SOURCE = """
class Coder:
    def encode(self, x):
        return x + 1

class Narrow(Coder):
    pass

class Other(Coder):
    def encode(self, x):
        return x + 2

def decode(x):
    return x - 1
"""
USER = "from toy.core import decode\ndef use(x):\n    return decode(x)\n"


def encode(original, self, x):
    if x > 100:
        raise RefusedError("x > 100")
    return original(self, x) * 10


def decode(original, x):
    return original(x) * 10


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A library of two modules, one of which imports from the other by name."""
    package = tmp_path / "toy"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "core.py").write_text(SOURCE)
    (package / "user.py").write_text(USER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "version", {"toy-dist": "1.4.2"}.__getitem__)
    import toy.core
    import toy.user

    yield toy
    for name in [name for name in sys.modules if name.split(".")[0] == "toy"]:
        del sys.modules[name]


def library(toy, versions=("1.4", "1.5"), **digests) -> Library:
    return Library(
        "toy",
        "toy-dist",
        versions,
        [
            Site("toy.core", "Coder.encode", digests.get("encode", digest_of(toy.core.Coder.encode)), encode),
            Site("toy.core", "decode", digests.get("decode", digest_of(toy.core.decode)), decode),
        ],
    )


def test_apply_serve_undo(toy):
    before = toy.core.Coder.encode, toy.core.decode, toy.user.decode
    lib = library(toy)
    assert lib.apply() is lib
    assert toy.core.Coder().encode(1) == toy.core.Narrow().encode(1) == 20
    assert toy.core.Other().encode(1) == 3
    assert toy.core.decode(3) == toy.user.use(3) == 20
    assert toy.core.Coder().encode(x=200) == 201
    status = lib.status()
    assert status.applied
    assert status.served == {"toy.core.Coder.encode": 2, "toy.core.decode": 2}
    assert status.refused == {("toy.core.Coder.encode", "x > 100"): 1}
    for said in (
        "toy 1.4.2: applied",
        "2  served   toy.core.decode",
        "1  refused  toy.core.Coder.encode: x > 100",
    ):
        assert said in str(status)
    assert toy.core.decode.__name__ == "decode"
    lib.undo()
    assert (toy.core.Coder.encode, toy.core.decode, toy.user.decode) == before
    assert not lib.status().applied
    lib.undo()


def test_with(toy):
    lib = library(toy)
    with lib.apply():
        assert toy.core.decode(3) == 20
    assert toy.core.decode(3) == 2


def test_what_is_imported_while_patched_is_restored_too(toy):
    del sys.modules["toy.user"]
    lib = library(toy).apply()
    import toy.user

    assert toy.user.use(3) == 20
    lib.undo()
    assert toy.user.use(3) == 2


def test_on_refuse(toy):
    with (
        library(toy).apply(on_refuse="raise"),
        pytest.raises(RuntimeError, match=r"toy: toy.core.Coder.encode is served by .* own code: x > 100"),
    ):
        toy.core.Coder().encode(200)
    with library(toy).apply(on_refuse="warn"):
        with pytest.warns(UserWarning, match="x > 100"):
            assert toy.core.Coder().encode(200) == 201
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            toy.core.Coder().encode(200)


def test_options_that_are_none(toy):
    lib = library(toy)
    with pytest.raises(ValueError, match="toy: on_refuse must be one of fallback, warn, raise, got 'ignore'"):
        lib.apply(on_refuse="ignore")
    with pytest.raises(TypeError, match="toy: force must be a bool, got"):
        lib.apply(force=1)
    with pytest.raises(ValueError, match="toy: least_work must be at least 0, got least_work=-1"):
        lib.apply(least_work=-1)
    assert toy.core.decode(3) == 2


def with_options(toy) -> Library:
    """It has two that want the same to be replaced."""
    site = Site("toy.user", "use", digest_of(toy.user.use), lambda original, x: original(x) + 1000)
    lib = library(toy)
    return Library("toy", "toy-dist", lib.versions, lib.sites, {"loud": (site,), "clear": (site,)})


@pytest.mark.parametrize(
    ("options", "used"),
    [({}, 20), ({"loud": False}, 20), ({"loud": True}, 1020), ({"loud": True, "clear": True}, 1020)],
)
def test_options_of_its_own(toy, options, used):
    lib = with_options(toy)
    with lib.apply(**options):
        assert toy.user.use(3) == used
        assert lib.chosen == {name for name, given in options.items() if given}
    assert toy.user.use(3) == 2


def test_options_that_it_does_not_have(toy):
    lib = with_options(toy)
    known = "on_refuse, least_work, force"
    with pytest.raises(TypeError, match=rf"toy: apply\(\) has no option low: .*{known}, loud, clear$"):
        lib.apply(low=True)
    with pytest.raises(TypeError, match=rf"toy: apply\(\) has no option loud: it must be one of {known}$"):
        library(toy).apply(loud=False)
    with pytest.raises(TypeError, match="toy: loud must be a bool, got 1 of type int"):
        lib.apply(loud=1)
    assert toy.core.decode(3) == 2


@pytest.mark.parametrize("versions", [("1.4.3", "2"), ("1", "1.4.2"), ("1.5", "1.6")])
def test_another_release(toy, versions):
    lib = library(toy, versions)
    least, beyond = versions
    with pytest.raises(
        RuntimeError, match=f"toy: release must be at least {least} and below {beyond}, got 1.4.2"
    ):
        lib.apply()
    assert toy.core.decode(3) == 2
    with lib.apply(force=True):
        assert toy.core.decode(3) == 20


def test_a_prerelease_counts_as_its_release(toy, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0.0b34")
    with library(toy, ("2.0", "2.1")).apply():
        assert toy.core.decode(3) == 20
    for versions in (("2.0.1", "2.1"), ("1.9", "2.0")):
        with pytest.raises(RuntimeError, match=r"got 2\.0\.0b34"):
            library(toy, versions).apply()


def test_not_installed(toy, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ModuleNotFoundError, match="toy: toy-dist is not installed: pip install toy-dist"):
        library(toy).apply()
    assert str(library(toy).status()) == "toy (no release): not applied"


@pytest.mark.parametrize("which", ["encode", "decode"])
def test_another_source_changes_nothing(toy, which):
    before = toy.core.Coder.encode, toy.core.decode
    with pytest.raises(
        RuntimeError, match=rf"toy.core.\S*{which} isn't what was tested: it was patched by others"
    ):
        library(toy, **{which: "0" * 16}).apply()
    assert (toy.core.Coder.encode, toy.core.decode) == before
    with library(toy, **{which: "0" * 16}).apply(force=True):
        assert toy.core.decode(3) == 20


def test_a_function_that_is_gone_changes_nothing(toy):
    lib = library(toy)
    del toy.core.decode
    with pytest.raises(RuntimeError, match=r"toy: toy.core.decode is not there in 1.4.2"):
        lib.apply()
    assert toy.core.Coder().encode(1) == 2


def test_twice(toy):
    lib = library(toy).apply()
    for other in (lib, library(toy)):
        with pytest.raises(RuntimeError, match=r"toy: our ops are under .* already: undo\(\) comes first"):
            other.apply()
        with pytest.raises(RuntimeError, match="already"):
            other.apply(force=True)
    lib.undo()
    assert toy.core.decode(3) == 2


def test_patched_by_others_before_us(toy):
    original = toy.core.decode
    lib = library(toy)
    toy.core.decode = lambda x: original(x) + 1000
    with pytest.raises(RuntimeError, match="patched by others"):
        lib.apply()


def test_patched_by_others_after_us(toy):
    lib = library(toy).apply()
    ours = toy.core.Coder.encode
    toy.core.Coder.encode = lambda self, x: ours(self, x)
    with pytest.raises(
        RuntimeError, match=r"toy.core.Coder.encode was patched by others after us: theirs goes first"
    ):
        lib.undo()
    assert lib.status().applied
    assert toy.core.decode(3) == 20
    toy.core.Coder.encode = ours
    lib.undo()
    assert toy.core.Coder().encode(1) == 2


def test_convert_one(toy):
    class Module(torch.nn.Module, toy.core.Coder):
        pass

    module, other = Module(), Module()
    lib = library(toy)
    assert lib.convert(module) is module
    assert (module.encode(1), other.encode(1)) == (20, 2)
    assert toy.core.decode(3) == 2
    with lib.apply():
        assert (module.encode(1), other.encode(1)) == (20, 20)
    assert lib.status().served["toy.core.Coder.encode"] == 3
    for wrong in (torch.nn.Linear(1, 1), type("Sub", (torch.nn.Module, toy.core.Other), {})()):
        with pytest.raises(TypeError, match="toy: module must be of a class that is served, got"):
            lib.convert(wrong)


def test_while_traced_the_original_serves(toy):
    lib = library(toy).apply()

    @torch.compile(backend="eager", fullgraph=True)
    def run(x):
        return toy.core.decode(x)

    assert run(torch.tensor(3)) == 2
    assert not lib.status().served

    lib.undo()


def test_all_that_are_imported(toy, monkeypatch):
    adapter = types.ModuleType("fastsparse.compat.toy")
    adapter.LIBRARY = library(toy)
    monkeypatch.setitem(sys.modules, "fastsparse.compat.toy", adapter)
    monkeypatch.setattr(compat, "LIBRARIES", ("absent", "toy"))
    with compat.apply():
        assert toy.core.decode(3) == 20
        assert [status.library for status in compat.status()] == ["toy"]
    assert toy.core.decode(3) == 2
    compat.apply(least_work=5)
    assert adapter.LIBRARY.least_work == 5
    compat.undo()
    assert toy.core.decode(3) == 2
    monkeypatch.setattr(compat, "LIBRARIES", ("absent",))
    with pytest.raises(RuntimeError, match="compat: none of these has been imported: absent"):
        compat.apply()


def test_all_or_none(toy, monkeypatch):
    good, bad = (types.ModuleType(name) for name in ("good", "bad"))
    good.LIBRARY, bad.LIBRARY = library(toy), library(toy, ("2", "3"))
    for name, adapter in (("good", good), ("bad", bad)):
        monkeypatch.setitem(sys.modules, f"fastsparse.compat.{name}", adapter)
        monkeypatch.setitem(sys.modules, name, adapter)
    monkeypatch.setattr(compat, "LIBRARIES", ("good", "bad"))
    with pytest.raises(RuntimeError, match="release must be"):
        compat.apply()
    assert toy.core.decode(3) == 2


def test_an_option_that_not_all_have(toy, monkeypatch):
    able, unable = (types.ModuleType(name) for name in ("able", "unable"))
    able.LIBRARY, unable.LIBRARY = with_options(toy), Library("unable", "toy-dist", ("1.4", "1.5"), ())
    for name, adapter in (("able", able), ("unable", unable)):
        monkeypatch.setitem(sys.modules, f"fastsparse.compat.{name}", adapter)
        monkeypatch.setitem(sys.modules, name, adapter)
    monkeypatch.setattr(compat, "LIBRARIES", ("able", "unable"))
    with pytest.raises(TypeError, match=r"unable: apply\(\) has no option loud"):
        compat.apply(loud=True)
    assert toy.core.decode(3) == 2


def test_what_isnt_worth_it():
    lib = Library("toy", "toy-dist", ("1", "2"), [])
    lib.refuse_unless_worth(torch.ones(1024, 64), 4096, k=32)
    with pytest.raises(RefusedError, match="little work"):
        lib.refuse_unless_worth(torch.ones(2, 3, 64), 4096)
    with pytest.raises(RefusedError, match="k > M / 4"):
        lib.refuse_unless_worth(torch.ones(1024, 64), 4096, k=1025)


# Libraries that have no release.


def unreleased(toy, **optional) -> Library:
    sites = [
        Site("toy.core", "decode", digest_of(toy.core.decode), decode),
        Site("toy.more", "twice", "", decode, **optional),
    ]
    return Library("toy", None, None, sites[: 1 + bool(optional)], repository="https://example.org/toy")


def test_without_a_release_digests_tell(toy):
    lib = unreleased(toy)
    with lib.apply():
        assert toy.core.decode(3) == 20
        assert lib.status().version is None
        assert str(lib.status()).startswith("toy (no release): applied")
    toy.core.decode = lambda x: x
    with pytest.raises(RuntimeError, match=r"toy.core.decode isn't what was tested: .* in what is imported"):
        lib.apply()
    del toy.core.decode
    with pytest.raises(RuntimeError, match=r"toy.core.decode is not there in what is imported"):
        lib.apply()


def test_without_a_release_a_clone_is_asked_for(toy):
    lib = unreleased(toy)
    sys.modules["toy"] = None
    with pytest.raises(ModuleNotFoundError, match=r"toy: .* a clone of https://example.org/toy must"):
        lib.apply()


@pytest.mark.parametrize("optional", [False, True])
def test_modules_that_need_more_may_be_left_out(toy, tmp_path, optional):
    (tmp_path / "toy" / "more.py").write_text("import not_installed_at_all\ndef twice(x): ...\n")
    importlib.invalidate_caches()
    lib = unreleased(toy, optional=optional)
    if optional:
        with lib.apply():
            assert toy.core.decode(3) == 20
        return
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        lib.apply()
    assert toy.core.decode(3) == 2


def test_a_module_of_its_own_is_never_left_out(toy):
    with pytest.raises(ModuleNotFoundError, match=r"toy\.more"):
        unreleased(toy, optional=True).apply()


def test_little_work_where_only_gpus_could_do_it():
    lib = Library("toy", "toy-dist", ("1", "2"), [])
    lib.refuse_unless_worth(torch.ones(2, 64), 4096, gpu_only=True)
    with pytest.raises(RefusedError, match="k > M / 4"):
        lib.refuse_unless_worth(torch.ones(2, 64), 4096, k=1025, gpu_only=True)


def test_what_somebody_chose_of_an_adam_stays():
    free, chosen = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.Adam([{"params": [free]}, {"params": [chosen], "fused": False}], lr=0.5)
    fuse_(optimizer)
    for _ in range(2):
        free.grad, chosen.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
        assert [group["fused"] for group in optimizer.param_groups] == [None, False]
    torch.testing.assert_close(free, chosen)
