"""`python -m tuppence` and the `tuppence` command."""

import os
import sys

from tuppence import cli, host


def main() -> int:
    """Run the command line; returns the exit code."""
    if host.world_size() == 1:
        return cli.main()
    try:
        code = cli.main()
    except SystemExit as end:  # a rank that followed the lead to its end
        code = int(end.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads do not always survive an orderly end of the interpreter


if __name__ == "__main__":
    sys.exit(main())
