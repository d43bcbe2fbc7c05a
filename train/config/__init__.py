"""Settings of training runs, read from TOML."""
