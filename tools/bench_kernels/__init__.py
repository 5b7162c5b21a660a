"""Measures and compiles the kernels: `wherefrom bench kernels`, `python -m wherefrom.tools.bench_kernels.ahead_of_time`."""
