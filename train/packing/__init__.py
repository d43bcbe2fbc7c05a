"""Sequences packed into rows of one length."""
