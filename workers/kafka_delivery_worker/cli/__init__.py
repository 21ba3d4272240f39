"""The command line, ``kafka-delivery``: one module per command, loaded when it is called."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

import click
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from kafka_delivery import settings
from kafka_delivery.errors import KafkaDeliveryError

COMMANDS = {
    "breaker": "How the circuits of the fleet are; overrule them.",
    "dead-letters": "See what Kafka refused, understand it, send it again.",
    "demo": "The whole way of a record, shown on embedded servers.",
    "doctor": "Check Redis, Kafka and the settings, and say what to do.",
    "exporter": "Metrics of the fleet, for Prometheus.",
    "release": "Give delayed and held messages back to the queues, before a downgrade.",
    "parked": "See what could go nowhere, send it again or discard it.",
    "settings": "All settings with their units, defaults and reasons.",
    "status": "What waits, what is in flight, what became of records.",
    "trace": "Where one record is now.",
}

EXTRAS = {"confluent_kafka": "worker", "rich": "worker"}


class Commands(click.Group):
    """Finds a command in the module of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name.replace('-', '_')}").command
        command.short_help = COMMANDS[cmd_name]
        return command


@click.command(cls=Commands)
@click.version_option(package_name="celery-kafka-delivery")
def cli() -> None:
    """Records on their way from applications to Kafka.

    Settings come from the environment: KAFKA_DELIVERY_REDIS_URL, KAFKA_DELIVERY_BOOTSTRAP_SERVERS and the others that
    `kafka-delivery settings` lists.
    """


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; what is wrong ends in one sentence and exit code 1 or 2."""
    for module, extra in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            sys.exit(
                f"kafka-delivery: {module} is not installed; this machine has what callers need. "
                f'For workers and this command: pip install "celery-kafka-delivery[{extra}]"'
            )
    from confluent_kafka import KafkaException  # after it is known that it is there

    from ..redis_faults import sentence

    if not all(_is_text(argument) for argument in (sys.argv[1:] if argv is None else argv)):
        click.echo("kafka-delivery: an argument is not UTF-8; a binary key or header is said as base64:...", err=True)
        sys.exit(2)
    try:
        cli(argv, prog_name="kafka-delivery")
    except KafkaDeliveryError as error:
        sys.exit(f"kafka-delivery: {error}")
    except KafkaException as error:
        sys.exit(f"kafka-delivery: Kafka: {error.args[0].str()}; `kafka-delivery doctor` says more")
    except TimeoutError:
        sys.exit("kafka-delivery: Kafka did not answer in time; `kafka-delivery doctor` says more")
    except (RedisError, KombuError) as error:
        sys.exit(f"kafka-delivery: {sentence(error, settings.current())}")
    except OSError as error:  # a full disk, for what is written to a file or to standard output
        sys.exit(f"kafka-delivery: {error.strerror or error}")


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True
