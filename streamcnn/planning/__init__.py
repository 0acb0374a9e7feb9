"""From a program and a machine to a plan. No tensor is allocated here, no file read."""
