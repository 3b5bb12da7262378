"""What the latents of a training run stand for, in one page that needs nothing else.

``report(ReportConfig(...))`` is the whole interface; ``python -m fastsparse report`` calls it. Without the
packages of the ``train`` extra there is :class:`ReportConfig` alone.
"""

from importlib.util import find_spec

from fastsparse.report.config import ReportConfig

_missing = next((name for name in ("numpy", "safetensors", "tqdm") if find_spec(name) is None), None)

if _missing is None:
    from fastsparse.report.page import Panel, Result
    from fastsparse.report.run import Report, report
else:

    def __getattr__(name: str) -> None:
        if name in __all__:
            raise ModuleNotFoundError(
                f"fastsparse.report needs {_missing}, which is not installed: "
                "pip install 'fastsparse-torch[train]'",
                name=_missing,
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Panel", "Report", "ReportConfig", "Result", "report"]
