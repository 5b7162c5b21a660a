"""Makes the evidence: `python -m wherefrom.tools.evidence`."""

import sys

from wherefrom.tools.evidence.command import main

if __name__ == "__main__":
    sys.exit(main())
