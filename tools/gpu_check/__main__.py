"""Runs the GPU check: `python -m wherefrom.tools.gpu_check`."""

import sys

from wherefrom.tools.gpu_check.command import main

if __name__ == "__main__":
    sys.exit(main())
