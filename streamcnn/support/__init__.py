"""What every room may need and none is about: units, text, files, checks, optional packages."""
