"""Learning: tasks, training steps, loops."""
