"""Rounding experts to few bits by what they see, and the distance of the result to its source."""
