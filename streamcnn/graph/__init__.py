"""The graph that is streamed: programs, the operators' rules and costs, and facts from ATen's schemas."""
