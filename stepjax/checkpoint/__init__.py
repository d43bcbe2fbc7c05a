"""Checkpoint folders in the Hugging Face layout: read, checked and written."""
