"""`python -m zoo`; the program itself is in `run`, which its processes can import."""

import sys

from zoo.run import main

if __name__ == "__main__":
    sys.exit(main())
