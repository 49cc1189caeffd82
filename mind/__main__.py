"""`python -m mind …` is the console script `mind …`."""

from __future__ import annotations

import sys

from mind.cli import main

if __name__ == "__main__":
    sys.exit(main())
