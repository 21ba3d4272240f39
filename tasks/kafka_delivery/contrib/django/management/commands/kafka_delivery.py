"""``manage.py kafka_delivery worker``: workers and the command line, told what Django was told."""

from __future__ import annotations

import argparse
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from kafka_delivery.contrib.command import become
from kafka_delivery.contrib.django.configuration import variables


class Command(BaseCommand):
    """Becomes the process that it is asked for: a worker has no Django in it."""

    help = (
        "Start a worker (worker), Flower (flower), or any command of kafka-delivery (doctor, status, ...), with "
        "settings.KAFKA_DELIVERY in its environment. What follows is theirs: kafka_delivery worker --loglevel=INFO"
    )

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("command", help="worker, flower, doctor, status, ...")
        parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of that command")

    def handle(self, *_: Any, command: str, arguments: list[str], **__: Any) -> None:
        if not self._called_from_command_line:
            raise CommandError("is for the command line: it would replace this process")
        become([command, *arguments], variables())
