"""Mutants by hand: `python tests/mutation/mutants.py --only claim.lua`; see `mutation.command`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # tests/, as pytest has it; this directory would hide the package
    from mutation.command import main

    sys.exit(main(sys.argv[1:]))
