"""Hostile input: the package's functions for files open valid files that were changed at random.

``python -m tests.fuzz --minutes 20 --seed 0 --target tiff``; `campaign` says what counts as a fault.
"""
