"""Code of a user that the settings name: files, modules, entry points."""
