"""The graph that is streamed: programs, the operators' rules, and what ATen says of operators."""
