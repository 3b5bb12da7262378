"""What `make hub` lays out for Hugging Face's kernel-builder, and that what it makes of it loads."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    not (ROOT / "hub").exists() or shutil.which("make") is None,
    reason="this is no checkout, or make is missing",
)

# As `kernels` imports what it has found: by its path, under the name that metadata.json gives.
LOADERS = {
    "importlib": (
        "import importlib.util, sys\n"
        "path = f'{folder}/torch-cpu/__init__.py'\n"
        "spec = importlib.util.spec_from_file_location('_fastsparse_cpu_0', path)\n"
        "kernel = importlib.util.module_from_spec(spec)\n"
        "sys.modules['_fastsparse_cpu_0'] = kernel\n"
        "spec.loader.exec_module(kernel)\n"
    ),
    "kernels": (
        "import kernels, pathlib\n"
        "kernel = kernels.get_local_kernel(pathlib.Path(folder), backend='cpu', trust_remote_code=True)\n"
    ),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "project"
    subprocess.run(["make", "--silent", "hub", f"HUB={folder}"], cwd=ROOT, check=True, timeout=60)
    return folder


@pytest.fixture(scope="module")
def variants(project) -> Path:
    """What kernel-builder makes of a project without code to compile: a copy for each backend."""
    folder = project / "build"
    for backend in ("cpu", "cuda"):
        shutil.copytree(project / "torch-ext" / "fastsparse", folder / f"torch-{backend}")
        about = {
            "id": f"_fastsparse_{backend}_0",
            "name": "fastsparse",
            "version": 0,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / f"torch-{backend}" / "metadata.json").write_text(json.dumps(about))
    return folder


def test_the_project_is_of_the_builders_form(project):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    read = tomllib.loads((project / "build.toml").read_text())
    assert read.keys() == {"general", "torch-noarch"}
    general = read["general"]
    assert general.keys() == {"name", "version", "edition", "license", "backends"}
    assert (general["edition"], general["license"]) == (5, "Apache-2.0")
    assert set(general["backends"]) <= {"cpu", "cuda", "rocm"}
    package = project / "torch-ext" / general["name"]
    assert (package / "__init__.py").exists()
    assert (package / "fastsparse" / "kernels" / "topk_encode.py").exists()
    assert {path.suffix for path in package.rglob("*") if path.is_file()} == {".py"}
    assert "genKernelFlakeOutputs" in (project / "flake.nix").read_text()


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    """In a process that knows of no other fastsparse."""
    alone = f"import sys; sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]\n"
    command = [sys.executable, "-c", f"{alone}folder = {str(folder)!r}\n{code}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("loader", LOADERS)
def test_what_is_built_loads_from_any_folder(variants, loader):
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    if loader == "kernels" and "kernels" not in installed:  # the name of a folder of ours, too
        pytest.skip("kernels is not installed")
    done = run(
        LOADERS[loader] + "import torch, fastsparse\n"
        "print(fastsparse.__file__)\n"
        "assert set(fastsparse.__all__) <= set(dir(kernel))\n"
        "code = kernel.topk_encode(torch.eye(3), torch.eye(3), k=1)\n"
        "assert code.indices.flatten().tolist() == [0, 1, 2]\n"
        "assert kernel.sparse_decode(*code, torch.eye(3)).equal(torch.eye(3))\n"
        "import fastsparse.kernels, fastsparse.nn\n",
        variants,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]) == variants / "torch-cpu" / "fastsparse" / "__init__.py"


def test_two_in_a_process_are_refused(variants):
    load = LOADERS["importlib"]
    done = run(load + "import sys; del sys.modules['_fastsparse_cpu_0']\n" + load, variants)
    assert done.returncode == 0, done.stderr  # the same one again
    done = run(load + load.replace("torch-cpu", "torch-cuda"), variants)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"ImportError: fastsparse: {variants / 'torch-cuda' / 'fastsparse'} can't be loaded beside"
    )
