"""See the package's docstring."""

import argparse
import sys

from . import __doc__ as purpose
from . import archs, headers, table
from .tools import TRITON_VERSIONS, MissingError, cuda_records, triton_records


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.compilation", description=purpose.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/compilation.{json,md}")
    parser.add_argument("--headers", action="store_true", help="only compile against other PyTorchs' headers")
    parser.add_argument("--archs", action="store_true", help="only say for which GPUs CI has to compile")
    arguments = parser.parse_args()
    if arguments.archs:
        print(archs.wanted())
        return 0
    if arguments.headers:
        headers.try_all()
        return 0
    sources = {
        f"Triton {version}": lambda version=version: triton_records(
            version, known=table.known(f"Triton {version}")
        )
        for version in TRITON_VERSIONS
    } | {"CUDA C++": cuda_records}
    sections = {}
    for title, records in sources.items():
        try:
            sections[title] = records()
        except MissingError as missing:
            print(f"{title} is left out: {missing}", file=sys.stderr)
    wrong = [
        f"{title}: {complaint}"
        for title, records in sections.items()
        for complaint in table.complaints(records)
    ]
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    if arguments.write and not wrong:
        table.write(sections)
        if "CUDA C++" in sections:
            archs.note(sections["CUDA C++"])
    print(table.page(sections))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
