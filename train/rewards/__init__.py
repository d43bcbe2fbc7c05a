"""What a reward is given and what it may return."""
