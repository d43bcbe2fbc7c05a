"""Teachers, which score the tokens of answers."""
