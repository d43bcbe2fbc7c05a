"""Processes that run the code of a user, with a time limit."""
