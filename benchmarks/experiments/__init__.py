"""What matching pursuit does that Top-k doesn't, and where it fails; docs/matching_pursuit.md tells."""
