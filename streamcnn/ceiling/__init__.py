"""Enforcing a budget, and measuring what was used."""
