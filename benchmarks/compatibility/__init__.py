"""Code that people write in a forward pass, streamed and plain: the same, or refused by name."""
