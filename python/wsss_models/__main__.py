"""`python -m wsss_models` is the `wsss` command."""

import sys

from wsss_models.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
