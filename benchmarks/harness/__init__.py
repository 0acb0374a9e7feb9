"""UltraMNIST under a memory budget: every method of the paper, and streaming, each in a process of its own.

Gupta et al., UltraMNIST Classification: A Benchmark to Train CNNs for Very Large Images (arXiv 2206.12681).
A method is an entry of a file in `methods/`, its kind a class in `kinds/`, a size of the benchmark one of
`scales`; `row` carries a method out under its ceiling, and `table` shows what came of all.
"""
