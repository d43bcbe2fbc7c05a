"""Rows of files: JSON lines, JSON arrays, parquet, ArrayRecord, data sets of the hub."""
