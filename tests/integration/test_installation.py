"""Redis remembers which Kafka a cluster's name stands for, and nobody hands a record to another one."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator

import pytest
import redis
from confluent_kafka import KafkaError

from kafka_delivery import names, send
from kafka_delivery.record import Record
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings
from kafka_delivery_worker import producer, readback, unserved
from kafka_delivery_worker.client import NotMadeError, connect, kafka_id
from kafka_delivery_worker.embedded import MockKafka, Valkey
from kafka_delivery_worker.installation import AnotherKafkaError, Installation
from kafka_delivery_worker.lease import script
from kafka_delivery_worker.parked_items import Call, Reason, of_call
from kafka_delivery_worker.parking import Parked, ParkingStore
from kafka_delivery_worker.producer import NoClientError, Outgoing, Producer, Report, ask_for_id
from kafka_delivery_worker.redrive import whole_letters
from kafka_delivery_worker.redrive.done import DoneOffsets
from kafka_delivery_worker.run_lock import RunLock
from kafka_delivery_worker.standstill import NO_ANSWER
from servers import read_all, wait_until
from stack import Stack, stack

TOPIC = "produced"
OTHER = "the-kafka-of-others"


@pytest.fixture
def kafka() -> Iterator[MockKafka]:
    with MockKafka(1) as kafka:
        for topic in (TOPIC, f"{TOPIC}-dlq"):
            kafka.create_topic(topic, 1)
        yield kafka


@pytest.fixture
def settings(redis_client: redis.Redis, redis_url: str, kafka: MockKafka) -> Settings:
    return Settings(redis_url=redis_url, bootstrap_servers=kafka.bootstrap_servers)


@pytest.fixture
def installation(settings: Settings) -> Installation:
    return Installation(RedisClient(settings), settings)


def stands_for(client: redis.Redis, kafka: str, cluster: str = "default") -> None:
    client.hset(names.CLUSTERS, cluster, kafka)


class TestStore:
    def test_the_first_kafka_is_remembered_and_another_one_is_refused(self, installation: Installation) -> None:
        assert installation.remembered() == ""
        installation.compare("a")
        assert installation.remembered() == ""  # a command settles nothing
        installation.remember("a")
        installation.remember("a")
        for refuse in (installation.remember, installation.compare):
            with pytest.raises(AnotherKafkaError, match=r"is b, but .* the Kafka a"):
                refuse("b")
        assert installation.remembered() == "a"

    def test_each_name_of_a_cluster_and_each_prefix_has_its_own(
        self, redis_client: redis.Redis, redis_url: str, installation: Installation
    ) -> None:
        installation.remember("a")
        for other in (
            Settings(redis_url=redis_url, cluster="blue"),
            Settings(redis_url=redis_url, redis_options={"global_keyprefix": "x:"}),
        ):
            Installation(RedisClient(other), other).remember("b")
        assert redis_client.hgetall(names.CLUSTERS) == {b"default": b"a", b"blue": b"b"}
        assert redis_client.hgetall(f"x:{names.CLUSTERS}") == {b"default": b"b"}

    def test_a_full_redis_remembers_too(self) -> None:
        """Workers empty it: they must start."""
        with Valkey() as valkey, redis.Redis.from_url(valkey.url) as client:
            client.config_set("maxmemory", 1)
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                client.hset(names.CLUSTERS, "default", "a")
            assert client.eval(script("remember"), 1, names.CLUSTERS, "default", "a") == b"a"
            assert client.eval(script("remember"), 1, names.CLUSTERS, "default", "b") == b"a"

    def test_a_kafka_without_an_id_is_let_pass_and_that_is_said_once(
        self, installation: Installation, caplog: pytest.LogCaptureFixture
    ) -> None:
        installation.remember("a")
        for _ in range(3):
            installation.admit("")
        assert [record.getMessage() for record in caplog.records] == [
            "installation.not_compared cluster=default: this Kafka has no id"
        ]
        assert installation.remembered() == "a"

    def test_without_redis_only_the_kafka_that_was_known_is_let_pass(self) -> None:
        with Valkey() as valkey:
            settings = Settings(redis_url=valkey.url, worker_socket_timeout_s=0.5)
            installation = Installation(RedisClient(settings), settings)
            installation.admit("a")
        installation.admit("a")
        for there in (installation, Installation(RedisClient(settings), settings)):
            with pytest.raises(NotMadeError, match="Redis does not say which Kafka default stands for"):
                there.admit("b")


# -- clients
class Sender:
    """A producer that asks, and what became of its records."""

    def __init__(self, settings: Settings) -> None:
        self.told: list[str] = []
        self.reports: list[Report] = []
        installation = Installation(RedisClient(settings), settings)
        self.producer = Producer(settings, on_client=self.told.append, admit=installation.admit)

    def send(self) -> None:
        self.producer.produce(Outgoing(TOPIC, b"x", None, [], 0, int(time.time() * 1000)), self.reports.append)

    def ready(self) -> None:
        self.producer.start()
        self.in_time(lambda: self.producer.has_client, "the client")

    def in_time(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(condition, 60, what)


@pytest.fixture
def sender(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sender]:
    monkeypatch.setattr(producer, "LONGEST_PAUSE_S", 0.2)
    monkeypatch.setattr(producer, "LOOK_S", 0.2)
    monkeypatch.setattr(producer, "FIRST_CLIENT_S", 0.2)
    monkeypatch.setattr(producer, "ASK_S", 0.3)
    sender = Sender(settings)
    yield sender
    sender.producer.close(0)


def in_kafka(kafka: MockKafka) -> int:
    return len(read_all(kafka.bootstrap_servers, [TOPIC]))


class TestClient:
    def test_a_kafka_tells_its_id_and_two_have_two(self, kafka: MockKafka, settings: Settings) -> None:
        with MockKafka(1) as other:
            ids = {ask_for_id(settings, 10), ask_for_id(Settings(bootstrap_servers=other.bootstrap_servers), 10)}
        assert len(ids) == 2
        assert all(ids)

    def test_asking_makes_no_topic(self, kafka: MockKafka, settings: Settings) -> None:
        ask_for_id(settings, 10)
        sender = connect(producer.librdkafka_properties(settings), print)
        try:
            assert kafka_id(sender.client, 10)
            assert {*sender.client.list_topics(timeout=10).topics} == {TOPIC, f"{TOPIC}-dlq"}
        finally:
            sender.close()

    def test_a_kafka_that_is_away_has_none(self, kafka: MockKafka, settings: Settings) -> None:
        kafka.down()
        with pytest.raises(NotMadeError, match=NO_ANSWER):
            ask_for_id(settings, 0.2)

    def test_the_right_kafka_gets_the_records(self, kafka: MockKafka, sender: Sender, settings: Settings) -> None:
        sender.ready()
        sender.send()
        sender.in_time(lambda: bool(sender.reports), "the report")
        assert sender.reports[0].error is None
        assert sender.told[-1] == ""
        assert Installation(RedisClient(settings), settings).remembered() == ask_for_id(settings, 10)

    def test_another_one_gets_none_until_it_is_meant(
        self, kafka: MockKafka, sender: Sender, settings: Settings, redis_client: redis.Redis
    ) -> None:
        stands_for(redis_client, OTHER)
        sender.producer.start()
        sender.in_time(lambda: bool(sender.told), "the first try")
        for _ in range(3):
            with pytest.raises(NoClientError, match=f"stands for the Kafka {OTHER}"):
                sender.send()
        assert in_kafka(kafka) == 0
        stands_for(redis_client, ask_for_id(settings, 10))
        sender.in_time(lambda: sender.told[-1] == "", "the client")
        sender.send()
        sender.in_time(lambda: bool(sender.reports), "the report")
        assert in_kafka(kafka) == 1

    def test_while_kafka_is_away_nothing_is_handed_over_that_a_wrong_one_would_get(
        self, kafka: MockKafka, sender: Sender, redis_client: redis.Redis
    ) -> None:
        stands_for(redis_client, OTHER)
        kafka.down()
        sender.producer.start()
        sender.in_time(lambda: NO_ANSWER in sender.told, "the question")
        with pytest.raises(NoClientError, match=NO_ANSWER):
            sender.send()
        kafka.up()
        sender.in_time(lambda: OTHER in sender.told[-1], "the answer")
        with pytest.raises(NoClientError, match=OTHER):
            sender.send()
        assert in_kafka(kafka) == 0

    def test_an_outage_at_the_start_ends_by_itself_and_is_no_trouble_of_the_process(
        self, kafka: MockKafka, sender: Sender, caplog: pytest.LogCaptureFixture
    ) -> None:
        kafka.down()
        sender.producer.start()
        sender.in_time(lambda: sender.told.count(NO_ANSWER) >= 2, "two questions")
        kafka.up()
        sender.in_time(lambda: sender.producer.has_client, "the client")
        assert {*sender.told} == {NO_ANSWER, ""}
        assert not any("producer.no_client" in record.getMessage() for record in caplog.records)

    def test_a_client_that_works_is_dropped_when_another_kafka_is_meant(
        self, kafka: MockKafka, sender: Sender, redis_client: redis.Redis
    ) -> None:
        sender.ready()
        kafka.fail_next(KafkaError.NOT_LEADER_FOR_PARTITION, 10_000)  # it keeps the record
        sender.send()
        stands_for(redis_client, OTHER)
        sender.in_time(lambda: bool(sender.reports), "the report")
        report = sender.reports[0].error
        assert report is not None
        assert report.code() in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT)
        assert OTHER in sender.told[-1]
        with pytest.raises(NoClientError, match=OTHER):
            sender.send()

    def test_it_looks_as_soon_as_brokers_that_were_away_are_back(
        self, kafka: MockKafka, sender: Sender, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(producer, "LOOK_S", 3600)
        sender.ready()
        sender.send()  # the connection is there
        sender.in_time(lambda: bool(sender.reports), "the report")
        stands_for(redis_client, OTHER)
        kafka.down()
        sender.in_time(lambda: sender.producer._doubtful, "the loss of all brokers")
        kafka.up()
        sender.in_time(lambda: OTHER in sender.told[-1], "the answer")

    def test_a_kafka_that_takes_longer_for_its_answer_gets_the_time(self, kafka: MockKafka, sender: Sender) -> None:
        kafka.delay(-1, int(1_200 * producer.ASK_S))
        sender.ready()
        kafka.delay(-1, 0)

    @pytest.mark.parametrize("made", [True, False], ids=["made", "candidate"])
    def test_an_end_while_kafka_is_asked_waits_for_the_question(
        self, kafka: MockKafka, sender: Sender, made: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """librdkafka would go on with memory that is not its own any more."""
        if made:
            sender.ready()
            sender.producer._doubtful = True
        kafka.down()
        sender.producer.start()
        begun = sender.producer._asking.locked if made else lambda: sender.producer._ask_s > producer.ASK_S
        sender.in_time(begun, "a question")
        sender.producer.close(0)
        maker = sender.producer._maker
        assert maker is not None
        maker.join(60)
        assert not maker.is_alive()
        assert "maker_failed" not in caplog.text

    def test_one_that_replaces_another_is_compared_before_it_takes_records(
        self, kafka: MockKafka, sender: Sender, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As when certificates are renewed: the new client may have come to another Kafka than the old one has."""
        monkeypatch.setattr(producer, "LOOK_S", 3600)
        sender.ready()
        made = sender.producer._made
        assert made is not None
        monkeypatch.setattr(producer, "identities", lambda properties: {"ssl.key.location": (1, 1, 1)})
        made.files = {"ssl.key.location": None}
        stands_for(redis_client, OTHER)
        sender.producer._renew(made)
        assert sender.producer._made is made


# -- commands
@pytest.fixture
def system(redis_client: redis.Redis, redis_url: str, kafka: MockKafka) -> Iterator[Stack]:
    with stack(redis_url, kafka) as system:
        yield system


def doctor(system: Stack) -> dict[str, dict[str, str]]:
    lines = system.command("doctor", "--json", check=False).stdout.splitlines()
    return {finding["check"]: finding for finding in map(json.loads, lines)}


class TestCommands:
    def test_doctor_calls_another_kafka_an_error(self, system: Stack, settings: Settings) -> None:
        assert doctor(system)["installation"]["level"] == "ok"
        stands_for(system.redis, OTHER)
        found = doctor(system)["installation"]
        assert found["level"] == "error"
        assert f"stands for the Kafka {OTHER}" in found["what"]
        assert "--adopt-kafka" in found["do"]
        assert system.command("doctor", check=False).returncode == 1

    def test_dead_letters_of_another_kafka_are_not_touched(self, system: Stack, kafka: MockKafka) -> None:
        system.command("dead-letters", "topics")
        stands_for(system.redis, OTHER)
        for arguments in (
            ("topics",),
            ("list", TOPIC),
            ("redrive", TOPIC, "--yes"),
            ("discard", TOPIC, "--all", "--reason", "x"),
        ):
            done = system.command("dead-letters", *arguments, check=False)
            assert done.returncode == 1
            assert done.stderr.startswith("kafka-delivery: the Kafka at ")
            assert OTHER in done.stderr
        assert system.waiting == 0

    def test_trace_does_not_read_another_kafka(self, system: Stack) -> None:
        stands_for(system.redis, OTHER)
        done = system.command("trace", "some-id", "--topic", TOPIC, check=False)
        assert done.returncode == 1
        assert OTHER in done.stderr

    def test_a_kafka_that_was_made_anew_is_adopted_by_a_person(
        self, system: Stack, settings: Settings, caplog: pytest.LogCaptureFixture
    ) -> None:
        stands_for(system.redis, OTHER)
        send.delay(TOPIC, "x")
        refused = system.command("doctor", "--adopt-kafka", check=False, stdin="n\n")
        assert refused.returncode == 1
        assert f"stands for the Kafka {OTHER}" in refused.stdout
        assert "the 1 messages that wait" in refused.stdout
        assert system.redis.hget(names.CLUSTERS, "default") == OTHER.encode()
        done = system.command("doctor", "--adopt-kafka", "--yes", "--json", check=False)
        here = ask_for_id(settings, 10)
        assert system.redis.hget(names.CLUSTERS, "default") == here.encode()
        assert f"kafka.adopted cluster=default before={OTHER} now={here} by=" in caplog.text
        assert all(json.loads(line) for line in done.stdout.splitlines())
        assert doctor(system)["installation"]["level"] == "ok"
        assert "needs no adoption" in system.command("doctor", "--adopt-kafka", check=False).stdout


class TestNames:
    """Clusters of different names share a Redis, and nothing of each other's."""

    @pytest.fixture
    def blue(self, redis_client: redis.Redis, redis_url: str, kafka: MockKafka) -> Iterator[Stack]:
        with stack(redis_url, kafka, CLUSTER="blue") as system:
            yield system

    def test_each_task_goes_to_the_queues_of_its_name(self, blue: Stack) -> None:
        send.delay(TOPIC, "short way")
        send.apply_async((TOPIC, "Celery's way"), countdown=60)
        send.bulk([{"topic": TOPIC, "value": "bulk"}])
        assert blue.redis.llen("kafka-delivery.blue") == 3
        assert blue.redis.llen("kafka-delivery") == 0
        assert send.si(TOPIC, "x").options["queue"] == "kafka-delivery.blue"
        found = json.loads(blue.command("status", "--json").stdout)
        assert found["queues"] == {"kafka-delivery.blue": 3, "kafka-delivery-dlq.blue": 0}

    def test_what_no_worker_takes_is_named(self, blue: Stack, redis_url: str) -> None:
        send.delay(TOPIC, "x")
        mine = Settings(redis_url=redis_url)
        redis_client = RedisClient(mine)
        base = names.CIRCUITS.format(cluster="default")
        assert unserved.read(redis_client, mine) == []  # nobody has ever worked for blue
        (found,) = unserved.read(redis_client, mine, search=True)
        assert (found.cluster, found.messages, found.served) == ("blue", 1, [])
        blue.redis.zadd(f"{base}workers", {"w": int(time.time() * 1000)})
        (found,) = unserved.read(redis_client, mine, search=True)
        assert found.served == ["default"]
        assert json.loads(blue.command("status", "--json").stdout)["unserved"] == [
            {"cluster": "blue", "messages": 1, "served": ["default"]}
        ]
        assert "for workers of blue, of which none runs" in blue.command("status").stdout
        (said,) = [line for line in doctor(blue).values() if line["check"] == "queues"]
        assert (
            "1 messages wait in kafka-delivery.blue and kafka-delivery-dlq.blue, and no worker of "
            "KAFKA_DELIVERY_CLUSTER=blue runs; workers run for default"
        ) in said["what"]
        blue.redis.zadd(f"{names.CIRCUITS.format(cluster='blue')}workers", {"w": int(time.time() * 1000)})
        assert unserved.read(redis_client, mine, search=True) == []

    def test_messages_of_the_time_before_a_name_had_queues_are_found(self, blue: Stack) -> None:
        blue.redis.lpush("kafka-delivery", "old")
        (found,) = json.loads(blue.command("status", "--json").stdout)["unserved"]
        assert (found["cluster"], found["messages"]) == ("default", 1)

    def test_release_leaves_another_clusters_messages_alone(self, blue: Stack) -> None:
        for queue in ("kafka-delivery", "kafka-delivery.blue", "of-an-operator"):
            blue.redis.zadd(names.DELAYED + queue, {"later": 1})
            blue.redis.sadd(names.WAITING, f"{TOPIC}:{queue}")
            blue.redis.lpush(f"{names.WAITING}:{TOPIC}:{queue}", "aside")
        blue.redis.hset(f"{names.HELD}their-worker", "1.1:kafka-delivery", "held")
        blue.redis.zadd(names.LEASES, {"their-worker": 2**50})
        blue.redis.hset(names.CLUSTERS, "default", "a")
        blue.redis.zadd(names.CIRCUITS.format(cluster="default") + "workers", {"w": int(time.time() * 1000)})
        assert json.loads(blue.command("release", "--json").stdout) == {
            "delayed": 2, "put_aside": 2, "still_held": 0, "still_running": 0,
        }  # fmt: skip
        assert blue.redis.lrange("kafka-delivery.blue", 0, -1) == [b"later", b"aside"]
        assert blue.redis.zcard(names.DELAYED + "kafka-delivery") == 1
        assert blue.redis.llen(f"{names.WAITING}:{TOPIC}:kafka-delivery") == 1

    def test_a_redrive_finds_the_parked_dead_letters_of_its_own_cluster_only(self, blue: Stack) -> None:
        store = ParkingStore(blue.redis)
        for cluster in ("blue", "default"):
            wire = Record(TOPIC, "x", message_id=f"of-{cluster}").to_wire(cluster)
            store.park_all(
                [
                    Parked(
                        id=wire[8], kind="dead-letter", content="record", topic=TOPIC, data=wire,
                        error_class="RejectedError", error_message="",
                    )
                ]
            )  # fmt: skip
        for cluster in ("blue", "default"):
            letters = whole_letters(store, TOPIC, int(time.time() * 1000) + 1_000, cluster)
            assert [letter.message_id for letter in letters] == [f"of-{cluster}"]

    def test_the_progress_of_a_redrive_is_of_one_cluster(self, blue: Stack, settings: Settings) -> None:
        redis_client = RedisClient(settings)
        blues, defaults = (DoneOffsets(redis_client, f"{TOPIC}-dlq", name) for name in ("blue", "default"))
        with (
            RunLock(redis_client, f"{TOPIC}-dlq", cluster="blue") as lock,
            RunLock(redis_client, f"{TOPIC}-dlq", cluster="default"),
        ):
            blues.begin(lock, "id", {0: 7}, [])
            assert defaults.floors() == ("", {})
            blues.mark(lock, [(0, 9)])
        assert blues.is_done(0, 9)
        assert not defaults.is_done(0, 9)

    def test_status_counts_what_is_put_aside_of_its_own_cluster_only(self, blue: Stack) -> None:
        for queue in ("kafka-delivery", "kafka-delivery.blue"):
            blue.redis.sadd(names.WAITING, f"{TOPIC}:{queue}")
            blue.redis.lpush(f"{names.WAITING}:{TOPIC}:{queue}", queue)
        found = json.loads(blue.command("status", "--json").stdout)
        assert found["put_aside"] == {TOPIC: 1}
        assert found["unserved"] == [{"cluster": "default", "messages": 1, "served": []}]

    def test_a_parked_call_is_sent_again_by_its_own_cluster_only(
        self, blue: Stack, redis_url: str, kafka: MockKafka
    ) -> None:
        def parked_as(cluster: str) -> None:
            call = Call(task=send.name, id=f"of-{cluster}", args=[], kwargs={"topic": TOPIC, "value": "x"})
            with stack(redis_url, kafka, CLUSTER=cluster):
                items = of_call(call, Reason(kind="expired", error_class="Expired", error_message=""))
            ParkingStore(blue.redis).park_all(items)

        for cluster in ("blue", "default"):
            parked_as(cluster)
        done = blue.command("parked", "redrive", "--all", "--yes", check=False)
        assert "it is for the Kafka cluster 'default'" in done.stderr
        assert [item.id for item in blue.parked()] == ["of-default"]
        assert blue.redis.llen("kafka-delivery.blue") == 1


def test_reading_back_asks_which_kafka_it_is(settings: Settings, kafka: MockKafka) -> None:
    told: list[str] = []
    with readback.Readback(settings, "id", None, 10, told.append) as reading:
        assert reading.look([TOPIC]) is None
    assert {*told} == {ask_for_id(settings, 10)}


def test_a_wrong_kafka_is_no_error_that_is_logged_with_every_look(
    settings: Settings, redis_client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    stands_for(redis_client, OTHER)
    with caplog.at_level(logging.WARNING), pytest.raises(NotMadeError):
        Installation(RedisClient(settings), settings).admit("here")
    assert caplog.records == []
