"""`python -m hf_sparselr`: the command `hf-sparselr`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
