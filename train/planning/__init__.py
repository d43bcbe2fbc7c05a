"""Training steps in the planner, and what a plan shows."""
