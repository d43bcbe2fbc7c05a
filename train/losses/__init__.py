"""Loss functions and the log-probabilities they need."""
