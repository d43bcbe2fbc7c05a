"""Reads the tools and histories of every interface into the one form that the chat template takes."""
