"""Compares hosts of ours with those of the library lightly: `python -m wherefrom.tools.against_lightly`."""
