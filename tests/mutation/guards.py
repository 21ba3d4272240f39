"""The files whose rules are changed, and the tests that guard each of them.

This is the one place to edit when tests move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import lua, python, table
from .mutant import Mutant

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Target:
    """A file with rules in it.

    Attributes:
        path: the file, below the root of the repository.
        tests: files and folders of tests that guard it, below `tests/`. The quickest comes first.
        within: the functions and classes to change; all of the file if this is empty.
        prelude: the script that the product puts before this one.
    """

    path: str
    tests: tuple[str, ...]
    within: tuple[str, ...] = ()
    prelude: str | None = None

    def mutants(self, root: Path = ROOT) -> list[Mutant]:
        """Return all mutants of the file."""
        source = (root / self.path).read_text("utf-8")
        if self.path.endswith(".py"):
            return python.mutants(self.path, source, self.within)
        made: Callable[[str, str], list[Mutant]] = lua.mutants if self.path.endswith(".lua") else table.mutants
        return made(self.path, source)


LEFT_OUT = "not TestRaces"
"""What pytest's option -k says: many processes at once prove that one of them wins, which is no single rule."""

WORKER = "workers/kafka_delivery_worker/"
CIRCUIT = WORKER + "breaker/circuit.lua"
ROOM = WORKER + "room.lua"
DEATHS = WORKER + "deaths.lua"

CLAIMS = ("integration/leases/test_scripts_of_claims.py", "integration/leases")
LEASES = ("integration/leases/test_scripts_of_leases.py", "integration/leases")
CIRCUITS = (
    "integration/circuits/test_scripts_of_circuits.py",
    "integration/circuits",
    "integration/breaker",
)
PARKING = ("integration/test_scripts_of_parking.py", "integration/test_parking_store.py")
COMMANDS = ("integration/test_scripts_of_commands.py",)
RETRIES = ("unit/test_rules_of_retries.py", "unit/test_attempts.py")

TARGETS = (
    Target(DEATHS, CLAIMS),
    Target(WORKER + "claim.lua", CLAIMS, prelude=DEATHS),
    Target(WORKER + "reap.lua", LEASES, prelude=DEATHS),
    Target(WORKER + "recall.lua", ("integration/leases/test_deaths_of_a_fleet.py",)),
    Target(WORKER + "renew.lua", LEASES),
    Target(WORKER + "release.lua", COMMANDS),
    Target(WORKER + "remember.lua", ("integration/test_installation.py",)),
    Target(WORKER + "find.lua", COMMANDS),
    Target(WORKER + "fronts.lua", COMMANDS),
    Target(ROOM, PARKING),
    Target(WORKER + "park.lua", PARKING, prelude=ROOM),
    Target(WORKER + "taken.lua", PARKING, prelude=ROOM),
    Target(WORKER + "unpark.lua", PARKING, prelude=ROOM),
    Target(WORKER + "drop.lua", (*PARKING, "integration/test_damaged.py"), prelude=ROOM),
    Target(WORKER + "send_back.lua", PARKING, prelude=ROOM),
    Target(CIRCUIT, CIRCUITS),
    Target(WORKER + "breaker/report.lua", CIRCUITS, prelude=CIRCUIT),
    Target(WORKER + "breaker/admit.lua", CIRCUITS, prelude=CIRCUIT),
    Target(WORKER + "breaker/settle.lua", CIRCUITS, prelude=CIRCUIT),
    Target(WORKER + "breaker/force.lua", CIRCUITS, prelude=CIRCUIT),
    Target(WORKER + "redrive/mark.lua", (*COMMANDS, "integration/test_done_offsets.py")),
    Target(WORKER + "redrive/floors.lua", (*COMMANDS, "integration/test_done_offsets.py")),
    Target(WORKER + "redrive/send.lua", COMMANDS),
    Target(WORKER + "run_lock.lua", (*COMMANDS, "integration/test_done_offsets.py")),
    Target(WORKER + "classify.py", ("unit/test_rules_of_errors.py", "unit/test_classify.py")),
    Target(WORKER + "errors.csv", ("unit/test_docs.py", "unit/test_classify.py")),
    Target(WORKER + "breaker/rules.py", ("unit/test_rules_of_a_local_circuit.py", "integration/circuits")),
    Target(WORKER + "breaker/silence.py", ("unit/test_rules_of_silence.py", "integration/breaker")),
    Target(WORKER + "breaker/attendance.py", ("unit/test_attendance.py", "integration/breaker/test_gaps.py")),
    Target(WORKER + "breaker/stall.py", ("integration/breaker/test_stalls.py", "integration/breaker/test_gaps.py")),
    Target(WORKER + "breaker/outcomes.py", ("unit/test_rules_of_outcomes.py", "unit/test_probes.py")),
    Target("tasks/kafka_delivery/disposition.py", ("unit/test_disposition.py",)),
    Target(
        "tasks/kafka_delivery/base.py",
        RETRIES,
        within=(
            "DeliveryTask.__call__",
            "DeliveryTask.park_call",
            "DeliveryTask.failed_here",
            "DeliveryTask.move",
            "DeliveryTask.pause_before_retry",
            "DeliveryTask.pause_before_resend",
            "DeliveryTask.retry",
            "DeliveryTask.redrives",
            "DeliveryTask.defer",
            "DeliveryTask.remember",
            "DeliveryTask.publish",
            "DeliveryTask.give_back",
        ),
    ),
    Target(
        "tasks/kafka_delivery/delivery.py",
        RETRIES,
        within=("Send.run", "Send.hand_over", "SendMany.run", "SendMany.park_member", "SendMany.fate", "final"),
    ),
    Target(
        WORKER + "lane.py",
        ("unit/test_rules_of_the_lane.py",),
        within=("Lane.take", "Lane._plain", "Lane._outgoing", "Lane._goes_on", "Lane._waits", "_watched", "_is_due"),
    ),
)


def missing(targets: tuple[Target, ...] = TARGETS, root: Path = ROOT) -> list[str]:
    """Return what is wrong with the table: files that are not there, and targets without tests."""
    wrong = [f"{target.path} has no tests" for target in targets if not target.tests]
    paths = [path for target in targets for path in (target.path, *(f"tests/{test}" for test in target.tests))]
    return wrong + [f"{path} does not exist" for path in dict.fromkeys(paths) if not (root / path).exists()]
