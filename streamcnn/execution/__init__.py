"""Execution: plans carried out tile by tile."""
