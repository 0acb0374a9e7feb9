"""Breadth: models of other libraries, listed by program, streamed and plain, and planned at 4000 x 4000."""
