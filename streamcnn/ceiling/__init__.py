"""What enforces a budget and measures what was used."""
