"""Runs the comparison: `python -m wherefrom.tools.against_lightly`."""

import sys

from wherefrom.tools.against_lightly.command import main

if __name__ == "__main__":
    sys.exit(main())
