"""Helpers that any package may use: units, text, files, checks, signals, optional packages."""
