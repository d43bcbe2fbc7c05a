"""What a compiled program holds and exchanges, read from XLA."""
