"""The streamed form of a user's module: cached captures and plans, passes, reports."""
