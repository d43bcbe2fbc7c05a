"""Objectives of fine-tuning: a class for each, and their table."""
