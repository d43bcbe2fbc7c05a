"""Training examples: sources, tasks, packing."""
