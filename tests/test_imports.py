"""What imports what: the arrows of the design run one way, and `import fastsparse` needs torch alone."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fastsparse

ROOT = Path(fastsparse.__file__).parents[1]

# Each layer may import those before it, and itself. Two names in a row stand side by side.
LAYERS = [
    {"fastsparse._exports", "fastsparse._options", "fastsparse._transforms"},
    {"fastsparse._validation", "fastsparse.backend", "fastsparse.reference", "fastsparse.kernels"},
    {"fastsparse.ops"},
    {"fastsparse.functional"},
    {"fastsparse"},
    {"fastsparse.codes"},
    {"fastsparse.nn"},
    {"fastsparse.diagnostics", "fastsparse.metrics"},
    {"fastsparse._extras", "fastsparse._files"},
    {"fastsparse.compat", "fastsparse.formats"},
    {"fastsparse._host", "fastsparse.info"},
    {"fastsparse._settings"},
    {"fastsparse.train", "fastsparse.collect", "fastsparse.report", "fastsparse.evaluate"},
    {"fastsparse.__main__"},
]
# The modules of this layer know nothing of one another.
INDEPENDENT = LAYERS[1]
# What a method looks up when it is called, above its layer: doors from a thing to what works on it.
DOORS = {("fastsparse.nn._model", "fastsparse.formats")}


def modules() -> dict[str, Path]:
    """Every module by its name as imported; kernels/ is installed as fastsparse.kernels."""
    package = {path: path.relative_to(ROOT) for path in sorted((ROOT / "fastsparse").rglob("*.py"))}
    package |= {
        path: Path("fastsparse") / path.relative_to(ROOT) for path in sorted((ROOT / "kernels").rglob("*.py"))
    }
    return {
        ".".join(name.with_suffix("").parts).removesuffix(".__init__"): path for path, name in package.items()
    }


def imports(name: str, path: Path, nodes: Callable = ast.walk) -> set[str]:
    """All that a module imports of fastsparse, at its top or in a function."""
    found = set()
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            # `from fastsparse import ops` names a module; `from fastsparse import TopK` something in one.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    known = modules()
    return {
        next(prefix for prefix in prefixes(target) if prefix in known)
        for target in found
        if target.split(".")[0] == "fastsparse"
    }


def prefixes(name: str) -> list[str]:
    """A dotted name and all that it lies in, longest first."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def unit(name: str) -> str:
    """What of LAYERS a module belongs to: its own name, or the subpackage that it is in."""
    return next(prefix for prefix in prefixes(name) if any(prefix in layer for layer in LAYERS))


def layer(name: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if unit(name) in layer)


def test_all_modules_are_seen():
    assert {
        "fastsparse",
        "fastsparse.ops.spmm",
        "fastsparse.reference.spmm",
        "fastsparse.kernels",
    } <= modules().keys()
    for name in modules():
        assert name == "fastsparse" or unit(name) != "fastsparse", (
            f"{name} stands in no layer: add it to LAYERS"
        )
    assert imports("fastsparse.ops.spmm", modules()["fastsparse.ops.spmm"]) >= {
        "fastsparse.reference",
        "fastsparse.ops._library",
    }


@pytest.mark.parametrize("name", modules())
def test_arrows_run_one_way(name):
    for target in imports(name, modules()[name]):
        if (name, target) in DOORS:
            continue
        assert layer(target) <= layer(name), f"{name} imports {target}, which stands above it"
        if {unit(name), unit(target)} <= INDEPENDENT:
            assert unit(target) == unit(name), f"{name} imports {target}: parts of this layer are independent"


@pytest.mark.parametrize(("name", "target"), DOORS)
def test_doors_are_opened_in_methods_alone(name, target):
    path = modules()[name]
    assert target in imports(name, path)
    assert target not in imports(name, path, ast.iter_child_nodes)
    assert target not in run(f"import sys, {name}; print(*sys.modules)").split()


def run(code: str, cwd: Path = ROOT) -> str:
    """What a fresh interpreter prints; it imports from the folder that it runs in first of all."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_torch_alone():
    # What torch itself imports is not ours to answer for.
    code = (
        "import torch, sys; before = set(sys.modules); import fastsparse; print(*set(sys.modules) - before)"
    )
    loaded = {name.split(".")[0] for name in run(code).split()}
    assert loaded - set(sys.stdlib_module_names) == {"fastsparse"}


def test_import_and_encode_without_what_is_optional():
    run(
        "import sys\n"
        "for name in 'numpy triton tqdm safetensors transformers matplotlib fastsparse._host'.split():\n"
        "    sys.modules[name] = None\n"
        "import warnings; warnings.simplefilter('ignore')\n"  # torch grumbles where numpy is missing
        "import torch, fastsparse\n"
        "code = fastsparse.topk_encode(torch.eye(3), torch.eye(3), k=1)\n"
        "assert fastsparse.sparse_decode(*code, torch.eye(3)).equal(torch.eye(3))"
    )


@pytest.fixture(params=["missing", "broken"])
def without_library(request, tmp_path) -> tuple[Path, str]:
    """A copy of the package whose compiled part is missing or broken, and what must be said of it."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    copy = shutil.copytree(ROOT / "fastsparse", tmp_path / "fastsparse", ignore=ignore)
    if request.param == "missing":
        return tmp_path, "_ops_cpu.so was not built: install with a C++ compiler, or use a wheel"
    for name in ("_ops_cpu.so", "_ops_cuda.so"):
        (copy / name).write_bytes(b"not a library")
    return tmp_path, "_ops_cpu.so could not be loaded: "


def test_without_the_compiled_library_the_reference_serves(without_library):
    place, reason = without_library
    out = run(
        "import torch, fastsparse\n"
        "print(fastsparse.__file__)\n"
        "print(fastsparse.backends()['cpu'])\n"
        "try:\n"
        "    with fastsparse.use_backend('cpu'): pass\n"
        "except RuntimeError as error: print(error)\n"
        "inputs = [torch.randn(*shape).double().requires_grad_() for shape in ((3, 4), (7, 4), (7,))]\n"
        "def autoencoder(x, weight, bias):\n"
        "    return fastsparse.sparse_decode(*fastsparse.topk_encode(x, weight, bias, k=2), weight)\n"
        "assert torch.autograd.gradcheck(autoencoder, inputs)\n"
        "assert torch.autograd.gradgradcheck(autoencoder, inputs)\n"
        "with fastsparse.use_backend('reference'): right = autoencoder(*inputs)\n"
        "assert torch.equal(autoencoder(*inputs), right)\n",
        cwd=place,
    ).splitlines()
    assert Path(out[0]).is_relative_to(place)
    assert out[1].startswith(f"cpu: unavailable ({reason}")
    assert out[2].startswith(f"backend 'cpu' was asked for and can't run here: {reason}")
