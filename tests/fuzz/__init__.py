"""Hostile input: valid files, changed at random, are opened by what the package offers for files.

``python -m tests.fuzz --minutes 20 --seed 0 --target tiff``; `campaign` says what counts as a fault.
"""
