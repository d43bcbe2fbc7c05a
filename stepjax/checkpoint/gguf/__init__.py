"""GGUF files, llama.cpp's format: read as checkpoints, and written."""
