"""`python -m ds_moe` is the command `ds-moe`."""

import sys

from ds_moe.cli import main

if __name__ == "__main__":
    sys.exit(main())
