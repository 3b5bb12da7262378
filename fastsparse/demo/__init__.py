"""A TopK SAE on a real transformer, from text to a report: ``python -m fastsparse.demo``."""
