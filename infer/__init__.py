"""Requests: prefill, decode, sampling, speculation."""
