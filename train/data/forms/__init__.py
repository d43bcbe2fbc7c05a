"""The forms that a row may have, one file each."""
