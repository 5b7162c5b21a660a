"""Checks and times a machine with a CUDA GPU in minutes: `python -m wherefrom.tools.gpu_check`."""
