"""`python -m stepjax` is the command `stepjax`."""

from stepjax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
