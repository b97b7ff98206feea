"""`python -m stabkit` is the `stabkit` command."""

import sys

from stabkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
