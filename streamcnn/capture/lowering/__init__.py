"""Lowering of a flat graph to a program, by the operators' rules, also where code merges spatial axes."""
