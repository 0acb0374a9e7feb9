"""A flat graph as a program: every call lowered by its rule, with axes of space that code has merged."""
