"""From a user's forward pass to a program, under guards."""
