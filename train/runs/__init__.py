"""Run folders: checkpoints, metrics, reports."""
