"""A training service beside the server: models of clients that speak the Tinker API."""
