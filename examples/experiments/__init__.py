"""What the methods do, not how fast; docs/matching_pursuit.md and docs/recurrences.md tell."""
