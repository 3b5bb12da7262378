"""The training log: one JSON object a line, in step with the checkpoints."""

import json
import os
from pathlib import Path
from typing import Any


class Log:
    """Appends records to a file; on opening drops those of steps after the one that the run resumes from.

    Raises:
        ValueError: the file holds something else than a training log.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        # Unbuffered: when `write` returns, the system has the record, and it survives this process.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        try:
            self._file.truncate(_end_of(path, step))
        except BaseException:
            self._file.close()
            raise

    def write(self, record: dict[str, Any]) -> None:
        """Append one record.

        Raises:
            OSError: the disk is full.
        """
        line = json.dumps(record).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(f"{self._path}: the log could not be written: {error}") from error

    def sync(self) -> None:
        """Have all records on the disk, before a checkpoint says that they are there."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _end_of(path: Path, step: int) -> int:
    """Where the records of steps up to ``step`` end, in bytes; a last line without its end does not count."""
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                if record["step"] > step:
                    break
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ValueError(
                    f"{path}: line {number} is no record of a training log: {line[:80]!r}"
                ) from error
            end += len(line)
    return end
