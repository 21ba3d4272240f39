"""Chaos by hand: `python tests/soak/chaos/chaos.py --seconds 1200 --seed 7`; see `soak.chaos.run`.

Needs java and redis-server. Exit code 1: something is lost, parked wrongly, changed, in the wrong Kafka or not at rest,
a circuit opened while Kafka was well, or a run of twenty minutes did too little to prove anything. With --stock the
faults of workers, servers and the network meet Celery's own transport, which loses messages; there, exit code 1 means
that nothing was lost, so that this harness would not notice a loss.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # tests/, as pytest has it
    from soak.chaos.run import main

    sys.exit(main(sys.argv[1:]))
