"""`python -m timm_resize`: the command line."""

import sys

from timm_resize.cli import main

if __name__ == "__main__":
    sys.exit(main())
