"""How the files of other tools spell quantised weights."""
