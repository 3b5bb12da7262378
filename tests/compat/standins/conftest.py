"""What stands in for libraries without releases holds no tests, and is imported under their names alone."""

collect_ignore_glob = ["*"]
