"""`python -m tuppence` and the `tuppence` command."""

import sys

from tuppence.cli import main

if __name__ == "__main__":
    sys.exit(main())
