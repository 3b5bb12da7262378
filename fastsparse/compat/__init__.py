"""Our ops under the libraries that people train with: one line, and one to take them away.

    import fastsparse.compat.sae_lens
    fastsparse.compat.sae_lens.apply()

Each module of a library has ``apply(on_refuse=, least_work=, force=)`` and the options that it names itself,
which ``with`` takes too, ``undo()``, ``status()``, and ``convert(module)`` for one module alone. What is here
does so for all libraries that have been imported.
"""

import sys
from contextlib import ExitStack
from importlib import import_module

from fastsparse.compat._library import Library, Status

LIBRARIES = (
    "circuit_tracer", "clt_training", "dictionary_learning", "llamascopium", "overcomplete", "pararnn",
    "sae_lens", "sparse_autoencoder", "sparsify",
)  # fmt: skip
IMPORTED_AS = {"clt_training": "sparsify"}  # where a library's name isn't its adapter's


def _libraries() -> list[Library]:
    """Those that have been imported, by name."""
    names = [name for name in LIBRARIES if IMPORTED_AS.get(name, name) in sys.modules]
    libraries = [import_module(f"fastsparse.compat.{name}").LIBRARY for name in names]
    return [library for library in libraries if library.is_imported()]


def apply(**options) -> ExitStack:
    """Put our ops under every library that has been imported and that we know: all of them, or none.

    Args:
        options: as of each library's ``apply``, which all of them must have.

    Returns:
        What ``with`` takes: at its end all is undone.

    Raises:
        RuntimeError: as each library's ``apply``; or there is none.
        TypeError: one of them has no such option; it says which.
    """
    found = _libraries()
    if not found:
        raise RuntimeError(f"compat: none of these has been imported: {', '.join(LIBRARIES)}")
    with ExitStack() as stack:
        for library in found:
            stack.enter_context(library.apply(**options))
        return stack.pop_all()
    raise AssertionError


def undo() -> None:
    """Take our ops away from every library that they are under."""
    for library in _libraries():
        library.undo()


def status() -> list[Status]:
    """Of every library that has been imported: what is patched, how often it served, and why it didn't."""
    return [library.status() for library in _libraries()]
