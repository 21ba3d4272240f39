"""A run stands still between comparing its lock and moving the group's offsets in Kafka, which knows no lock.

Another run ends meanwhile, and the move comes late. It brings nothing back; an offset that a person resets does.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, TopicPartition
from confluent_kafka.admin import AdminClient

from kafka_delivery import settings
from kafka_delivery.names import REDRIVE
from kafka_delivery.redis_client import RedisClient
from kafka_delivery_worker.redrive import Backlog, Cluster
from letters import bury, command, lag, waiting
from stack import Stack, stack
from watching import emptied

COUNT = 20
PARTITIONS = range(4)
DISCARD = ("--all", "--reason", "a test", "--yes")


@pytest.fixture(params=["mock", pytest.param("real", marks=pytest.mark.real)])
def system(request: pytest.FixtureRequest, redis_url: str) -> Iterator[Stack]:
    """Without a worker: discards send nothing."""
    kafka = request.getfixturevalue("mock_kafka" if request.param == "mock" else "real_kafka")
    with stack(emptied(redis_url), kafka) as system:
        yield system


@pytest.fixture
def topic(system: Stack) -> str:
    """A topic with dead letters that wait."""
    name = f"late-{uuid.uuid4().hex[:8]}"
    for one in (name, f"{name}-dlq"):
        system.kafka.create_topic(one, len(PARTITIONS))
    bury(system, name, COUNT)
    return name


def test_a_late_move_brings_nothing_back_and_a_persons_reset_does(system: Stack, topic: str) -> None:
    command(system, "discard", topic, *DISCARD)
    assert (waiting(system, topic), lag(system, topic)) == (0, 0)

    s = settings.current()
    redis = RedisClient(s)
    with Backlog(Cluster(s, redis), redis, f"{topic}-dlq") as backlog:
        backlog.commit(dict.fromkeys(PARTITIONS, 0))
    assert (waiting(system, topic), lag(system, topic)) == (0, COUNT)
    bury(system, topic, 1, first=COUNT)
    command(system, "discard", topic, *DISCARD)  # which sets the lag right
    assert (waiting(system, topic), lag(system, topic)) == (0, 0)

    reset(system, topic)
    assert waiting(system, topic) == COUNT + 1


@pytest.mark.parametrize("move", ["first", "last"])
def test_who_finds_its_lock_lost_after_the_move_takes_it_back(
    system: Stack, topic: str, monkeypatch: pytest.MonkeyPatch, move: str
) -> None:
    commit, moves = Backlog.commit, []

    def late(self: Backlog, floors: Mapping[int, int], *patience: Any) -> None:
        moves.append(floors)
        if len(moves) == (1 if move == "first" else 2):
            with monkeypatch.context() as undone:
                undone.setattr(Backlog, "commit", commit)
                system.redis.delete(f"{REDRIVE}{topic}-dlq:lock")  # instead of waiting for its end
                bury(system, topic, COUNT, first=COUNT)
                command(system, "discard", topic, *DISCARD)
        commit(self, floors, *patience)

    monkeypatch.setattr(Backlog, "commit", late)
    done = command(system, "discard", topic, *DISCARD, check=False)

    assert done.returncode == 1
    assert "was lost" in done.stderr
    assert (waiting(system, topic), lag(system, topic)) == (0, 0)
    assert len(moves) == (2 if move == "first" else 3)


def reset(system: Stack, topic: str) -> None:
    """Move the group to the beginning, as Kafka's own tools do it."""
    group = f"kafka-delivery-redrive.{topic}-dlq"
    places = [TopicPartition(f"{topic}-dlq", partition, 0) for partition in PARTITIONS]
    admin = AdminClient({"bootstrap.servers": system.kafka.bootstrap_servers})
    admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(group, places)])[group].result(60)
