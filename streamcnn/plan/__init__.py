"""Data types of plans and hardware profiles; a plan is the only message from planning to execution."""
