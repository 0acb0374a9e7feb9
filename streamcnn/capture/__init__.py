"""Capture: from a user's forward pass to a program, reused for as long as guards hold."""
