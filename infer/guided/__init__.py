"""Answers that a grammar constrains."""
