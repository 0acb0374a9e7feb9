"""Time and memory of a pass, streamed and by what one would use instead, side by side.

A case (`cases`) is a network on images of one size. Each way to compute it (`kinds`) has a process of its own
(`passes` runs there, `worker` commands it), and processes take turns (`rounds`). What was measured
(`results`) is one JSON line a case, a table and a figure.
"""
