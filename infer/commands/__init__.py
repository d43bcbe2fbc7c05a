"""Verbs of the command line that answer prompts."""
