"""Kernels that join small parts of a decode step, each of which XLA would launch by itself."""
