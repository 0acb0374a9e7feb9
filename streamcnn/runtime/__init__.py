"""A user's module streamed: captures and plans that are kept, passes, reports."""
