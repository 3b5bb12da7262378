"""What Hugging Face's `kernels` loads by another name, from any folder: fastsparse, which lies beside."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_PACKAGE = Path(__file__).parent / "fastsparse"

# PyTorch knows an op by one name in a process.
if "fastsparse" in sys.modules and Path(sys.modules["fastsparse"].__file__).parent != _PACKAGE:
    raise ImportError(
        f"fastsparse: {_PACKAGE} can't be loaded beside {Path(sys.modules['fastsparse'].__file__).parent}, "
        "which is: one of them serves a process"
    )
if "fastsparse" not in sys.modules:
    _spec = spec_from_file_location("fastsparse", _PACKAGE / "__init__.py")
    sys.modules["fastsparse"] = module_from_spec(_spec)
    try:
        _spec.loader.exec_module(sys.modules["fastsparse"])
    except BaseException:
        del sys.modules["fastsparse"]
        raise

from fastsparse import *  # noqa: E402, F403
from fastsparse import __all__, __version__  # noqa: E402, F401
