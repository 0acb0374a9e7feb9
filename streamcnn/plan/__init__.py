"""What a plan and a machine are, as data: the only message from planning to running."""
