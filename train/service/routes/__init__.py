"""The endpoints of the training service."""
