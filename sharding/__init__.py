"""Placement: the same model on any mesh."""
