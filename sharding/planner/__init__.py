"""Bytes, times and limits of a layout, computed without a device."""
