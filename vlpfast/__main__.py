"""`python -m vlpfast` and `torchrun -m vlpfast`."""

import sys

from vlpfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
