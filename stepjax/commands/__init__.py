"""Verbs of the command line that need one device: info, convert, merge."""
