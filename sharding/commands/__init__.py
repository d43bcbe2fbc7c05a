"""Verbs of the command line that move adapters between formats."""
