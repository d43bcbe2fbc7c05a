"""Training of all parameters, as step-tiny was made."""
