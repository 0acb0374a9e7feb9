"""A user's module, streamed: kept captures and plans, passes, reports."""
