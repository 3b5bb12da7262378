"""llamascopium: what lets its autoencoders be imported; nothing of it is measured.

The package's own ``__init__`` imports its data bases, pipelines and command lines, and with them MongoDB's
client and more; an empty package is put in its place, of which its models, which use none of that, are
imported.
"""

from benchmarks.peers._stand_in import stand_in_for


def stand_in_for_the_package() -> None:
    stand_in_for("llamascopium")
