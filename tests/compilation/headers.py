"""Whether the CUDA library compiles against the headers of other PyTorchs than the one that is here.

Whoever installs from sources compiles against a PyTorch of their own; docs/headers.json says with which
PyTorch these very sources have been tried. As long as they don't change nothing is fetched and nothing
compiled: a PyTorch with CUDA is a large download.
"""

import hashlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .tools import BUILD, ROOT

RECORD = ROOT / "docs" / "headers.json"
VERSIONS = ("2.10.0", "2.11.0")  # from the oldest that is served on; the build itself has the newest

_spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(setup)


def sources() -> list[Path]:
    """What may meet PyTorch's headers. Device code is in .cuh and knows no PyTorch."""
    paths = (path for folder in (setup.CSRC, setup.CSRC / "cuda") for path in folder.iterdir())
    return sorted(path for path in paths if path.suffix in (".h", ".cpp", ".cu"))


def hash_of(sources: Iterable[Path], *others: str) -> str:
    """A hash of sources, of what in setup.py says how CUDA's are compiled, and of what else matters."""
    how = (setup.flags, setup.nvcc_flags, setup.torch_flags, setup.ops_cuda, setup.shared, setup.cpp)
    texts = [f"{path.relative_to(ROOT)}\n{path.read_text(encoding='utf-8')}" for path in sources]
    texts += [inspect.getsource(function) for function in how]
    return hashlib.sha256("\n".join([*texts, setup.TORCH_TARGET, *others]).encode()).hexdigest()[:12]


def key() -> str:
    """A hash of the sources, and of how they are compiled."""
    return hash_of(sources())


def record() -> dict[str, str]:
    """By version of PyTorch, the key of the sources that were compiled against it."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def include(version: str) -> Path:
    """The headers of a version of PyTorch, in build/; nothing else is kept of its wheel."""
    folder = BUILD / f"torch-{version}"
    if not folder.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as draft:
            # The headers are the same for every Python; this one has wheels of all these versions.
            options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--dest", draft]
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", *options]
            subprocess.run([*command, f"torch=={version}"], check=True)
            (wheel,) = Path(draft).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.startswith("torch/include/")]
                archive.extractall(draft, names)
            Path(draft, "torch", "include").rename(folder)
    return folder


def compile_against(headers: Path) -> None:
    """Compile all of the CUDA library, for one GPU, and keep nothing; a file that fails is an error."""
    os.environ["FASTSPARSE_CUDA_ARCHS"] = "90"
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def one(source: Path, target: Path, command: list[str]) -> None:
            command[command.index("-isystem") + 1] = str(headers)
            subprocess.run([*command, "-c", source, "-o", target], check=True)

        jobs, _, _ = setup.ops_cuda(Path(folder))
        list(pool.map(lambda job: one(*job), jobs))


def try_all() -> None:
    """Compile against every PyTorch that these very sources haven't been tried with, and record it."""
    for version in VERSIONS:
        if record().get(version) == key():
            print(f"CUDA C++ is known to compile against PyTorch {version}")
        elif setup.nvcc() is None:
            print(f"CUDA C++ against PyTorch {version} is left out: no nvcc was found")
        else:
            print(f"CUDA C++ is compiled against PyTorch {version}", flush=True)
            compile_against(include(version))
            tried = {name: known for name, known in record().items() if name in VERSIONS} | {version: key()}
            RECORD.write_text(json.dumps(tried, indent=1, sort_keys=True) + "\n", encoding="utf-8")
