"""One module a peer, each saying which of its calls is measured. Imported only with ``--peers``."""
