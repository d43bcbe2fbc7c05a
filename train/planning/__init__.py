"""Plans of training steps, and how plans are shown and checked."""
