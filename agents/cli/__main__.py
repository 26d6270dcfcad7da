"""`python -m agents.cli` is `unigrpo`."""

import sys

from agents.cli import main

if __name__ == "__main__":
    sys.exit(main())
