"""What the workers tell Prometheus, added up over all of them, is what became of the records: as many were delivered as
a consumer finds, as many are dead letters, as many are parked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from confluent_kafka import KafkaError

from kafka_delivery import send, send_many
from kafka_delivery_worker.embedded import MockKafka, free_port
from scenarios.test_retries import PASSING
from scraping import Scraped, exporter, ports, scrape
from servers import wait_until
from stack import Stack, stack
from watching import ALONE, emptied

TOPICS = ("orders", "bills")
WORKERS = 3
REFUSED = KafkaError.POLICY_VIOLATION

RECORDS, FLEET = "kafka_delivery_records_total", "kafka_delivery_fleet_records_total"

Account = dict[tuple[str, str], int]


@pytest.mark.timeout(120)
def test_the_sums_over_all_workers_are_the_account_of_the_records(redis_url: str) -> None:
    with MockKafka() as kafka, stack(emptied(redis_url), kafka, METRICS_PORT=free_port()) as system:
        for topic in TOPICS:
            kafka.create_topic(topic)
            kafka.create_topic(f"{topic}-dlq")
        workers = [system.worker(*ALONE, ready=False) for _ in range(WORKERS)]
        for worker in workers:
            worker.wait_ready()
        places = ports(*workers)
        assert len(set(places)) == WORKERS

        account: Account = Counter()
        send_everything(system, kafka, account)
        system.wait_empty()

        wait_until(lambda: totals(map(scrape, places), RECORDS) == account, 60, f"the workers to tell {account}")
        found = [scrape(port) for port in places]
        assert sum(one.sum(RECORDS, outcome="delivered") > 0 for one in found) > 1, "one did it all: nothing was added"

        # By an independent consumer, and by looking into the parking store.
        delivered = Counter(("delivered", record.topic) for record in system.read(*TOPICS))
        letters = Counter(
            ("dead-lettered", one.topic[: -len("-dlq")]) for one in system.read("orders-dlq", "bills-dlq")
        )
        parked = Counter(("parked", item.topic or "") for item in system.parked())
        assert delivered + letters + parked == Counter(
            {key: count for key, count in account.items() if key[0] != "retried"}
        )

        assert sum(one.sum("kafka_delivery_record_errors_total") for one in found) == 2 + 1 + 2, "as injected"
        measured = sum(one.sum("kafka_delivery_end_to_end_seconds_count") for one in found)
        assert measured == sum(delivered.values())
        with exporter(system) as port:
            wait_until(lambda: totals([scrape(port)], FLEET) == account, 60, "the fleet's counters to say the same")
            assert scrape(port).sum("kafka_delivery_parked_records") == sum(parked.values())
            assert scrape(port).sum("kafka_delivery_dead_letters_total") == sum(letters.values())
            assert scrape(port).sum("kafka_delivery_workers") == WORKERS


def send_everything(system: Stack, kafka: MockKafka, account: Account) -> None:
    """Send records of every fate, and put into `account` what must become of them."""
    send.bulk([{"topic": TOPICS[number % 2], "value": str(number)} for number in range(2000)])
    account["delivered", "orders"] += 1000
    account["delivered", "bills"] += 1000
    send_many.delay([{"topic": "orders", "value": str(number)} for number in range(100)])
    account["delivered", "orders"] += 100
    system.wait_empty()
    # One record at a time: a request fails as a whole. Refused twice is refused as a dead letter, too.
    for code, failures, fate in ((PASSING, 2, "retried"), (REFUSED, 1, "dead-lettered"), (REFUSED, 2, "parked")):
        kafka.fail_next(code, failures)
        send.delay("bills", "fails")
        system.wait_empty()
        account[fate, "bills"] += failures if fate == "retried" else 1
    account["delivered", "bills"] += 1
    # A call that is no record; bytes that are no message.
    send.app.send_task(send.name, ("not a topic!", "v"), queue="kafka-delivery", argsrepr="()", kwargsrepr="{}")
    system.redis.lpush("kafka-delivery", "garbage")
    account["parked", ""] += 2
    system.wait_parked(3)


def totals(answers: Iterable[Scraped], name: str) -> Account:
    found: Counter[tuple[str, str]] = Counter()
    for one in answers:
        for (outcome, topic), count in one.by(name, "outcome", "topic").items():
            found[outcome, topic] += int(count)
    return found
