"""What the latents of a training run stand for, in one page that needs nothing else.

``report(ReportConfig(...))`` is the whole interface; ``python -m fastsparse report`` calls it. Without the
packages of the ``train`` extra there is :class:`ReportConfig` alone.
"""

from fastsparse._extras import explaining, missing
from fastsparse.report.config import ReportConfig

__all__ = ["Panel", "Report", "ReportConfig", "Result", "report"]

_missing = missing("numpy", "safetensors", "tqdm")

if _missing is None:
    from fastsparse.report.page import Panel, Result
    from fastsparse.report.run import Report, report
else:
    __getattr__ = explaining(__name__, _missing, "train", __all__)
