"""Answers sampled by the engine for training."""
