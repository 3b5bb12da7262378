"""What a report is asked to show. The command line is made from these fields and their help."""

from dataclasses import dataclass

from fastsparse._settings import check, option


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Everything that a report depends on; for its fields see ``python -m fastsparse report --help``.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range.

    Example:
        >>> from fastsparse.report import ReportConfig
        >>> ReportConfig(run="runs/first").features
        24
    """

    run: str = option("folder of a training run", positional=True)
    data: str | None = option("folder that collect made (default: the one that the run was trained on)", None)
    output: str | None = option("the page (default: report.html in the run's folder)", None)
    title: str | None = option("its heading", None)
    features: int = option("show so many latents", 24)
    max_tokens: int = option("read so many tokens and no more, whose codes are held in memory", 2**20)
    device: str = option("auto, cpu, cuda, or one GPU of several, such as cuda:1", "auto")

    def __post_init__(self) -> None:
        check(self)
