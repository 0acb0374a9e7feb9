"""Code that people write in a forward pass, compared streamed and plain: the same, or refused by name."""
