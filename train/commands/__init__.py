"""Verbs of the command line that plan and train."""
