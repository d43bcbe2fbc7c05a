"""Models that score the same tokens."""
