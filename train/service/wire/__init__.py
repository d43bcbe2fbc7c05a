"""The bodies of the training service's requests and results."""
