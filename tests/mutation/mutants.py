"""Mutants by hand: `python tests/mutation/mutants.py --only claim.lua`; see `mutation.command`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # tests/, as pytest has it; this directory would hide the package
    from mutation.command import main

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that copies and servers go with it
    sys.exit(main(sys.argv[1:]))
