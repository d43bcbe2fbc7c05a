"""Continuous batching: scheduler, pages, steps on the device."""
