"""Ceilings: enforce a budget, and measure the memory that was used."""
