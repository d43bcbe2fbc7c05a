"""Training of all parameters from random ones, as for step-tiny."""
