"""Chaos by hand: `python tests/chaos/chaos.py --seconds 1200 --seed 7`; see `chaos.run`.

Needs java and redis-server. With --stock the same faults meet Celery's own transport, and losses are expected.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # tests/, as pytest has it; this directory would hide the package
    from chaos.run import main

    sys.exit(main(sys.argv[1:]))
