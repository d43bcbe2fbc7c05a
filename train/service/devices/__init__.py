"""The arrays of the models that clients train, on the devices of all processes."""
