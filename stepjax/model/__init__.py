"""The model on one device, written with axis names only."""
