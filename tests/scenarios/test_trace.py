"""`kafka-delivery trace` with a worker and Kafka: a record is delivered, refused, or held."""

from __future__ import annotations

import redis
from confluent_kafka import KafkaError

from kafka_delivery import names, send
from kafka_delivery.record import uuid7
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.whereabouts import Where
from servers import wait_until
from stack import Stack, stack
from traced import DEAD, DELIVERED, NOT_FOUND, ON_ITS_WAY, PAYLOAD, place, trace
from watching import ALONE


class TestOfTheWorld:
    """With a worker, and Kafka."""

    def test_it_is_delivered(self, delivery: Stack, topic: str) -> None:
        delivery.worker(*ALONE)
        ids = [send.delay(topic, PAYLOAD, key=str(n)).id for n in range(30)]
        records = {dict(one.headers)["message-id"].decode(): one for one in delivery.wait_for(topic, set(ids))}  # type: ignore[union-attr]
        wait_until(lambda: bool(delivery.redis.hget(names.COUNTS, f"delivered:{topic}")), 60, "it to be counted")
        delivery.wait_empty()
        found = trace(ids[17], code=DELIVERED)
        where = records[ids[17]]
        assert (found["topic"], found["partition"], found["offset"]) == (topic, where.partition, where.offset)
        assert found["known_from"] == "topic"

        wanted = send.apply_async((topic, PAYLOAD), ignore_result=False)
        result = wanted.get(timeout=60)
        delivery.wait_empty()
        found = trace(wanted.id, "--limit", "0", code=DELIVERED)
        assert (found["offset"], found["known_from"]) == (result["offset"], "result")

        done = delivery.command("trace", uuid7(), "--topic", topic, check=False)
        assert done.returncode == NOT_FOUND
        assert done.stderr == ""

        never = uuid7()
        found = trace(never, "--topic", topic, "--topic", "no-such-topic", code=NOT_FOUND)
        assert found["records_read"] >= 31
        assert found["topics"] == [topic, f"{topic}-dlq"]
        assert set(found["missing_topics"]) >= {"no-such-topic"}
        found = trace(never, "--topic", topic, "--limit", "5", code=NOT_FOUND)
        assert found["records_not_read"] > 0

    def test_it_is_refused_and_held(self, redis_client: redis.Redis, redis_url: str, mock_kafka: MockKafka) -> None:
        for name in ("orders", "orders-dlq"):
            mock_kafka.create_topic(name)
        with stack(redis_url, mock_kafka) as system:
            system.worker(*ALONE)
            mock_kafka.fail_next(KafkaError.POLICY_VIOLATION)
            refused = send.delay("orders", PAYLOAD)
            system.wait_for("orders-dlq", {refused.id})
            system.wait_empty()
            found = trace(refused.id, "--topic", "orders", code=DEAD)
            assert (found["where"], found["topic"]) == ("dead-lettered", "orders-dlq")
            assert found["original_topic"] == "orders"
            assert found["error_class"] == "RejectedError"
            assert "POLICY_VIOLATION" in found["error_message"]

            mock_kafka.down()
            held = send.delay("orders", PAYLOAD)
            wait_until(lambda: (at := place(held.id)) is not None and at.where == Where.HELD, 60, "a worker to hold it")

            def named() -> bool:
                """A busy worker may not answer in time."""
                found.update(trace(held.id, code=ON_ITS_WAY))
                return found["worker"] is not None

            wait_until(named, 30, "the worker to say that it holds it")
            assert found["worker"].startswith("w0@")
            assert 0 < found["lease_ends_in_s"] <= 30
            mock_kafka.up()
            system.wait_for("orders", {held.id})
