"""What can be wrong with the settings, Redis and Kafka, found before it costs a record.

Each check says what it found and, where that is not well, what to do. Nothing here raises or hangs: a server that
fails or does not answer is a finding too.
"""

from __future__ import annotations

import queue
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, Literal

from confluent_kafka import KafkaError, KafkaException, libversion
from confluent_kafka import Producer as Client
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported, not marked as such
    AdminClient,
    ConfigResource,
    ResourceType,
)
from kombu.exceptions import KombuError
from kombu.utils.url import parse_url
from redis.exceptions import RedisError, ResponseError

from kafka_delivery import settings
from kafka_delivery.errors import SettingsError
from kafka_delivery.faults import QUEUE_FAULTS
from kafka_delivery.names import is_topic_name
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import DEAD_LETTER_HEADROOM_BYTES, Settings

from . import broker, counts, unserved
from .installation import DO, AnotherKafkaError, Installation, shown
from .producer import check_properties
from .redis_faults import explained, place
from .topics import ADMIN_TIMEOUT_S, admin, create_topic

REDIS_TIMEOUT_S = 5.0
"""For each answer of Redis. A slow one is a finding, not a failure: a round trip may take seconds."""

PINGS = 3
"""Round trips to Redis, of which the shortest counts: one may meet a pause of either host."""

SECOND_TRY_S = 7.0
"""Kombu tries a second time to connect, and only then says why it could not: twice the other, and some more."""

KAFKA_TIMEOUT_S = 5.0
"""For each answer of Kafka; a first connection with TLS and SASL takes several round trips."""

OWN_TIMEOUT_S = 3.0
"""For what asks no server; only a function of the user's (KAFKA_DELIVERY_OAUTH_CB) can take long."""

LEAST_REDIS = (6, 2)
"""What Celery 5.7 needs. A Valkey names the Redis that it is compatible with."""

FULL = 0.7
"""Share of a limit from which it is time to raise it: the backlog of a Kafka outage comes on top."""

SKEW_WARNING_S, SKEW_ERROR_S = 1.0, 30.0
"""Clocks apart. Pauses between attempts and the timestamps of records come from the clock of each machine."""

NOBODY = {"sasl.username": "-", "sasl.password": "-"}
"""Without a user librdkafka refuses most mechanisms before it says whether it has them."""

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        check: a name for programs.
        level: ``ok``; ``warning``, works until something else goes wrong; ``error``, does not work or loses records.
        what: what was found; never a secret.
        do: what to do about it; empty where all is well.
    """

    check: str
    level: Level
    what: str
    do: str = ""


@dataclass(frozen=True, slots=True)
class Creation:
    """How missing topics are created.

    Attributes:
        partitions: of a topic; its dead-letter topic has `Settings.dead_letter_partitions`.
        replication: of both; None is the cluster's default, and `Settings.dead_letter_replication`.
    """

    partitions: int = 4
    replication: int | None = None


def examine(topics: Sequence[str] = (), creation: Creation | None = None) -> Iterator[Finding]:
    """Check everything, one finding at a time.

    Args:
        topics: the topics to look at; by default those that the counters know.
        creation: how to create what is missing; None creates nothing. A topic that only the counters know may be a
            typo of a caller's: it is not created, only its dead-letter topic.
    """
    try:
        s = settings.current()
    except Exception as error:
        yield Finding("settings", "error", reason(error), "correct that environment variable; nothing else was checked")
        return
    yield Finding("settings", "ok", "understood; `kafka-delivery settings` lists them")
    yield from _within(OWN_TIMEOUT_S, "librdkafka", _librdkafka(s), "correct KAFKA_DELIVERY_PRODUCER or _OAUTH_CB")

    seen: set[str] = set()
    reach_redis = (
        f"is a Redis at {place(s.redis_url)}, and may this machine and this user reach it? "
        "In KAFKA_DELIVERY_REDIS_URL, special characters of a password are percent-encoded"
    )
    yield from _within(
        REDIS_TIMEOUT_S + SECOND_TRY_S, "redis", _redis(s, seen), reach_redis, lambda error: explained(error, s).do
    )

    if not s.queue_on_redis:
        yield from _within(REDIS_TIMEOUT_S + SECOND_TRY_S, "broker", _broker(s), "correct KAFKA_DELIVERY_BROKER_URL")

    reach_kafka = (
        f"is a Kafka at {s.bootstrap_servers}, and may this machine reach it? "
        "Are the security properties in KAFKA_DELIVERY_PRODUCER right?"
    )
    patience_s = max(KAFKA_TIMEOUT_S, ADMIN_TIMEOUT_S) + 2  # more than what any call in there may take
    yield from _within(patience_s, "kafka", _kafka(s, topics, seen, creation), reach_kafka)


def _within(
    patience_s: float,
    check: str,
    findings: Iterable[Finding],
    do: str,
    do_of: Callable[[Exception], str] | None = None,
) -> Iterator[Finding]:
    """`findings`, and one more if they fail or if the next one takes longer than `patience_s` seconds.

    Args:
        patience_s: for each.
        check: their name.
        findings: what is looked for.
        do: what to do about that one more, if `do_of` does not say it of an error.
    """
    found: queue.SimpleQueue[Finding | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            for finding in findings:
                found.put(finding)
        except Exception as error:
            found.put(Finding(check, "error", reason(error), do if do_of is None else do_of(error)))
        found.put(None)

    # In a thread, because not everything takes a timeout: looking up a host's name does not.
    threading.Thread(target=run, name=f"kafka-delivery-doctor-{check}", daemon=True).start()
    while True:
        try:
            finding = found.get(timeout=patience_s)
        except queue.Empty:
            finding = Finding(check, "error", f"no answer within {patience_s:g} s", do)
            found.put(None)
        if finding is None:
            return
        yield finding


def reason(error: Exception) -> str:
    """`error` in one line, without secrets."""
    if isinstance(error, KafkaException) and isinstance(error.args[0], KafkaError):
        return f"{error.args[0].name()}: {_one_line(error.args[0].str())}"
    if isinstance(error, SettingsError):
        return _one_line(str(error))
    if isinstance(error, RedisError | KombuError | OSError):
        return f"{type(error).__name__}: {_one_line(str(error))}"
    # Of an unplanned error only the type: what fails to parse a URL quotes pieces of it, and of its password.
    return f"{type(error).__name__}; its text may hold a secret and is not shown"


# -- librdkafka


def _librdkafka(s: Settings) -> Iterator[Finding]:
    version = libversion()[0]
    mechanism = s.producer.get("sasl.mechanism") or s.producer.get("sasl.mechanisms")
    if mechanism:
        try:
            # Asked for by itself, because a property that is not in use is not looked at.
            Client({"security.protocol": "sasl_plaintext", "sasl.mechanism": mechanism, "log_level": 0, **NOBODY})
        except KafkaException as error:
            yield Finding(
                "sasl",
                "error",
                f"SASL mechanism {mechanism} is not in this librdkafka {version}: {reason(error)}",
                f"configure one that is, or install a confluent-kafka that was built with {mechanism}",
            )
            return
        if not str(s.producer.get("security.protocol", "")).lower().startswith("sasl_"):
            yield Finding(
                "sasl",
                "warning",
                f"SASL mechanism {mechanism} is set, but not used: security.protocol does not say SASL",
                'set "security.protocol" to "sasl_ssl" in KAFKA_DELIVERY_PRODUCER',
            )
        else:
            yield Finding("sasl", "ok", f"librdkafka {version} has {mechanism}")
    missing = check_properties(s)
    if missing:
        do = "put that where workers find it; they start without it, wait, and deliver nothing until then"
        yield Finding("librdkafka", "error", f"no client can be made now: {missing}", do)
        return
    yield Finding("librdkafka", "ok", f"librdkafka {version} accepts the properties")


# -- Redis


def _redis(s: Settings, seen: set[str]) -> Iterator[Finding]:
    """Findings about Redis; adds the topics that the counters know to `seen`."""
    yield from _encryption(s.redis_url)
    redis = RedisClient(s, REDIS_TIMEOUT_S)
    client = redis.client
    try:
        info: dict[str, Any] = client.info()
    except ResponseError as error:
        client.ping()
        yield Finding("redis", "ok", f"{place(s.redis_url)} answers")
        do = "allow this user the commands INFO, CONFIG GET and TIME"
        yield Finding("redis-info", "warning", f"INFO is refused, so little could be checked: {reason(error)}", do)
        return
    server = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info.get('redis_version')}"
    yield Finding("redis", "ok", f"{server} at {place(s.redis_url)}")
    config, refused = _config(client)
    if refused is not None:
        yield Finding(
            "redis-config",
            "warning",
            f"CONFIG is refused, as managed services do ({reason(refused)}): some settings could not be read",
            "look in the service's own console: append-only file on, fsync every second, policy noeviction",
        )
    yield _version(info)
    mode = _mode(info)
    yield mode
    if mode.level != "ok":
        return  # it is the wrong server: how it is set up does not matter
    yield _eviction(info)
    yield _persistence(info, config)
    yield _memory(info)
    yield _clients(info)
    yield _replicas(info)
    yield _latency(client, s.enqueue_timeout_s)
    yield _clock(client)
    yield from _unserved(s, redis)
    seen.update(topic for topic in counts.read(client, redis.prefix) if topic not in ("", counts.OTHER_TOPICS))


def _unserved(s: Settings, redis: RedisClient) -> Iterator[Finding]:
    """Queues that nobody takes messages from."""
    for one in unserved.read(redis, s, search=True):
        do = (
            f"start workers with KAFKA_DELIVERY_CLUSTER={one.cluster}, or correct the name that these callers have; "
            "messages from before a change of name are drained as the page on operating says"
        )
        yield Finding("queues", "warning", one.what, do)


def _config(client: Any) -> tuple[dict[str, str], ResponseError | None]:
    """The settings that INFO does not tell, or why they cannot be read."""
    try:
        return client.config_get("save") | client.config_get("appendfsync"), None
    except ResponseError as error:
        return {}, error


def _encryption(url: str) -> Iterator[Finding]:
    parts = [parse_url(part) for part in url.split(";")]
    if url.startswith("rediss://"):
        tls = [part.get("ssl", {}) for part in parts]
        if any(options.get("ssl_cert_reqs") == ssl.CERT_NONE for options in tls):
            what, do = "no certificate is verified (ssl_cert_reqs in the URL): anybody may pose as Redis", "remove it"
            yield Finding("redis-tls", "error", what, f"{do}; name a CA of your own with ?ssl_ca_certs=/path/to/ca.pem")
        elif any(options.get("ssl_check_hostname") is False for options in tls):
            what = "the certificate need not be this host's (ssl_check_hostname in the URL)"
            yield Finding("redis-tls", "warning", what, "remove it, and connect by a name that the certificate has")
        else:
            yield Finding("redis-tls", "ok", "encrypted, certificate verified")
    elif all(_loopback(part["transport"], part["hostname"]) for part in parts):
        yield Finding("redis-tls", "ok", "not encrypted, and does not leave this machine")
    else:
        what = "not encrypted: records and the password cross the network in the clear"
        yield Finding("redis-tls", "warning", what, "use rediss:// where the network is not your own")


def _loopback(scheme: str, host: str | None) -> bool:
    if "socket" in scheme or host in (None, "", "localhost"):
        return True
    try:
        return ip_address(str(host)).is_loopback
    except ValueError:
        return False


def _version(info: Mapping[str, Any]) -> Finding:
    text = str(info.get("redis_version"))
    version = tuple(int(digits) for digits in re.findall(r"\d+", text)[:2])
    if version < LEAST_REDIS:
        least = ".".join(map(str, LEAST_REDIS))
        return Finding("redis-version", "error", f"version {text}, older than {least}", "update Redis")
    return Finding("redis-version", "ok", f"version {text}")


def _mode(info: Mapping[str, Any]) -> Finding:
    if info.get("cluster_enabled"):
        do = "use a Redis without cluster mode; replicas and Sentinel are no cluster mode"
        return Finding("redis-mode", "error", "cluster mode: Celery's Redis transport cannot use it", do)
    if info.get("role") == "slave":
        return Finding("redis-mode", "error", "a replica: it refuses writes", "connect to the primary")
    return Finding("redis-mode", "ok", "a primary, without cluster mode")


def _eviction(info: Mapping[str, Any]) -> Finding:
    policy = info.get("maxmemory_policy")
    if policy == "noeviction":
        return Finding("redis-eviction", "ok", "maxmemory-policy noeviction: a full Redis refuses, and drops nothing")
    do = "set maxmemory-policy to noeviction; a cache belongs in a Redis of its own"
    if policy is None:
        return Finding("redis-eviction", "warning", "maxmemory-policy could not be read", do)
    return Finding("redis-eviction", "error", f"maxmemory-policy {policy}: a full Redis drops records that wait", do)


def _persistence(info: Mapping[str, Any], config: Mapping[str, str]) -> Finding:
    check, use_aof = "redis-persistence", "set appendonly to yes and appendfsync to everysec"
    if info.get("aof_enabled"):
        if info.get("aof_last_write_status", "ok") != "ok":
            what = "the append-only file cannot be written: Redis refuses writes"
            return Finding(check, "error", what, "free its disk, or look in Redis's log")
        fsync = config.get("appendfsync")
        if fsync == "no":
            what = "append-only file, flushed when the system likes: a machine that dies loses half a minute"
            return Finding(check, "warning", what, "set appendfsync to everysec")
        return Finding(check, "ok", f"append-only file, appendfsync {fsync or 'unknown'}")
    if "save" not in config:
        return Finding(check, "warning", "no append-only file, and whether snapshots are made is unknown", use_aof)
    if not config["save"]:
        return Finding(check, "error", "nothing is kept on disk: a restart loses everything that waits", use_aof)
    what = f"no append-only file, only snapshots (save {config['save']}): a crash loses what came after the last one"
    return Finding(check, "warning", what, use_aof)


def _memory(info: Mapping[str, Any]) -> Finding:
    used, limit = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    if not limit:
        what = "maxmemory is not set: a long backlog ends in the system killing Redis"
        do = "set maxmemory to what the machine can spare, so that a full Redis refuses sends"
        return Finding("redis-memory", "warning", what, do)
    what = f"{used / limit:.0%} of maxmemory in use ({used:,} of {limit:,} bytes)"
    if settings.current().backlog_max_bytes >= limit:
        do = "set KAFKA_DELIVERY_BACKLOG_MAX_BYTES to about three quarters of maxmemory"
        return Finding("redis-memory", "warning", f"{what}; it is full before the limit for new sends", do)
    if used > FULL * limit:
        return Finding("redis-memory", "warning", what, "raise maxmemory, or find out why records wait or are parked")
    return Finding("redis-memory", "ok", what)


def _clients(info: Mapping[str, Any]) -> Finding:
    connected, limit = int(info.get("connected_clients", 0)), int(info.get("maxclients", 0))
    what = f"{connected} of {limit or 'an unknown number of'} clients connected"
    if limit and connected > FULL * limit:
        return Finding("redis-clients", "warning", what, "raise maxclients: a client too many is refused")
    return Finding("redis-clients", "ok", what)


def _replicas(info: Mapping[str, Any]) -> Finding:
    replicas = int(info.get("connected_slaves", 0))
    what = f"{replicas} replicas"
    # INFO has the number of good ones only where min-replicas-to-write asks for some.
    if replicas and "min_slaves_good_slaves" not in info:
        what += ", and writes do not wait for any: a failover loses what was not copied yet"
        do = "set min-replicas-to-write to 1 and min-replicas-max-lag to 10, which bounds that loss"
        return Finding("redis-replicas", "warning", what, do)
    return Finding("redis-replicas", "ok", what)


def _latency(client: Any, patience_s: float) -> Finding:
    took_s = []
    for _ in range(PINGS):
        began = time.monotonic()
        client.ping()
        took_s.append(time.monotonic() - began)
    what = f"a round trip takes {min(took_s) * 1000:,.1f} ms"
    if min(took_s) < patience_s:
        return Finding("redis-latency", "ok", what)
    what += f", and a send gives up after KAFKA_DELIVERY_ENQUEUE_TIMEOUT_S={patience_s:g}"
    return Finding("redis-latency", "error", what, "bring Redis nearer, find out what keeps it busy, or raise that")


def _clock(client: Any) -> Finding:
    before = time.time()
    try:
        seconds, micros = client.time()
    except ResponseError as error:
        return Finding("clock", "warning", f"not compared: {reason(error)}", "allow this user the command TIME")
    after = time.time()
    theirs = seconds + micros / 1e6
    # The answer was made at an unknown moment between the two.
    apart = max(0.0, before - theirs, theirs - after)
    what = f"the clocks of Redis and of this machine are {apart:.1f} s apart (Kafka does not tell its time)"
    if apart <= SKEW_WARNING_S:
        return Finding("clock", "ok", what)
    do = "synchronise the clocks of all machines (NTP): pauses before retries and timestamps depend on them"
    return Finding("clock", "error" if apart > SKEW_ERROR_S else "warning", what, do)


# -- another broker


def _broker(s: Settings) -> Iterator[Finding]:
    """Findings about the Celery broker that messages wait in instead of Redis."""
    waiting = {queue: broker.waiting(queue) for queue in s.queues}
    yield Finding("broker", "ok", f"{place(s.broker_url)} answers; how it keeps messages was not checked")
    missing = [queue for queue, count in waiting.items() if count is None]
    if missing:
        what = f"no queue {' and '.join(missing)} yet: the first worker or send makes it"
        yield Finding("broker-queues", "ok", what)
    else:
        yield Finding(
            "broker-queues", "ok", ", ".join(f"{count} waiting in {queue}" for queue, count in waiting.items())
        )
    yield Finding(
        "broker-guarantees",
        "warning",
        "workers do not lease messages here: they have Celery's and this broker's own guarantees",
        "read about another broker on the page on operating; with Redis alone more is promised",
    )


# -- Kafka


def ask_for_id(s: Settings) -> str:
    """Return the id of the Kafka that the settings name; "" if it has none.

    Raises:
        KafkaException: it does not answer.
    """
    client = admin(replace(s, producer=s.producer | {"log_level": 0}))
    return client.list_topics(timeout=KAFKA_TIMEOUT_S).cluster_id or ""


def _kafka(s: Settings, named: Sequence[str], seen: Iterable[str], creation: Creation | None) -> Iterator[Finding]:
    heard: list[KafkaError] = []
    quiet = {"error_cb": heard.append, "log_level": 0}
    client = admin(replace(s, producer=s.producer | quiet))
    try:
        metadata = client.list_topics(timeout=KAFKA_TIMEOUT_S)
    except KafkaException as error:
        client.poll(0)  # hands out what librdkafka heard meanwhile; the error itself only says that it failed
        causes = [KafkaException(e) for e in heard if e.code() != KafkaError._ALL_BROKERS_DOWN]
        raise causes[0] if causes else error from None
    brokers = len(metadata.brokers)
    yield Finding("kafka", "ok", f"{brokers} broker(s) in the cluster {metadata.cluster_id} at {s.bootstrap_servers}")
    yield from _installation(s, metadata.cluster_id or "")
    yield from _Topics(s, client, metadata).findings(named, seen, creation)


def _installation(s: Settings, here: str) -> Iterator[Finding]:
    """Whether this is the Kafka that the cluster's name stands for in Redis; nothing where Redis does not answer."""
    check = "installation"
    if not here:
        what = "this Kafka has no id, so it cannot be told from another one"
        yield Finding(check, "warning", what, "make sure that no other installation uses this Redis")
        return
    installation = Installation(RedisClient(s, REDIS_TIMEOUT_S), s)
    try:
        installation.compare(here)
        known = installation.remembered()
    except AnotherKafkaError as error:
        yield Finding(check, "error", error.what, DO)
    except QUEUE_FAULTS:
        return  # it is a finding already
    else:
        kafka = f"the Kafka {shown(known)}" if known else "no Kafka yet: the first worker settles it"
        yield Finding(check, "ok", f"KAFKA_DELIVERY_CLUSTER={s.cluster} stands for {kafka}")


class _Topics:
    """Checks of topics and their dead-letter topics."""

    def __init__(self, s: Settings, client: AdminClient, metadata: Any) -> None:
        self._settings = s
        self._client = client
        self._topics: dict[str, Any] = metadata.topics

    def findings(self, named: Sequence[str], seen: Iterable[str], creation: Creation | None) -> Iterator[Finding]:
        wanted = sorted(set(named or seen))
        if not wanted:
            yield Finding("topic", "ok", "none was named (--topic) and none is in the counters yet")
        usable = []
        for topic in wanted:
            if is_topic_name(topic) and is_topic_name(self._settings.dead_letter_topic(topic)):
                usable.append(topic)
            else:
                do = "use 1 to 249 of a-z A-Z 0-9 . _ - with room for the suffix of its dead-letter topic"
                yield Finding("topic", "error", f"{topic[:60]!r} cannot be a topic's name", do)
        letters = sorted({self._settings.dead_letter_topic(topic) for topic in usable})
        if creation is not None:
            yield from self._create(usable if named else [], letters, creation)
        configs, unread = self._configs([topic for topic in [*usable, *letters] if topic in self._topics])
        for why, topics in unread.items():
            do = "allow this user DescribeConfigs on these topics, or check max.message.bytes yourself"
            yield Finding("topic-settings", "warning", f"not read for {', '.join(topics)}: {why}", do)
        for topic in usable:
            yield from self._topic(topic, bool(named), configs.get(topic))
        for topic in letters:
            yield from self._dead_letter_topic(topic, configs.get(topic))

    def _create(self, topics: Iterable[str], letters: Iterable[str], how: Creation) -> Iterator[Finding]:
        s = self._settings
        replication = -1 if how.replication is None else how.replication
        letters_replication = s.dead_letter_replication if how.replication is None else how.replication
        plan = [(topic, how.partitions, replication) for topic in topics]
        plan += [(topic, s.dead_letter_partitions, letters_replication) for topic in letters]
        created = []
        for topic, partitions, copies in plan:
            if topic in self._topics:
                continue
            try:
                failure = create_topic(self._client, topic, partitions, copies)
            except TimeoutError:
                failure = KafkaError(KafkaError._TIMED_OUT)
            if failure is None:
                created.append(topic)
                yield Finding("create", "ok", f"{topic} was created with {partitions} partition(s)")
            else:
                do = "allow this user to create topics, or create it with other tools"
                yield Finding("create", "error", f"{topic} was not created: {reason(KafkaException(failure))}", do)
        deadline = time.monotonic() + KAFKA_TIMEOUT_S
        while created and time.monotonic() < deadline:
            # A broker learns of a new topic a moment after the controller has confirmed it.
            self._topics = self._client.list_topics(timeout=KAFKA_TIMEOUT_S).topics
            if all(topic in self._topics for topic in created):
                return
            time.sleep(0.1)

    def _configs(self, topics: Sequence[str]) -> tuple[dict[str, dict[str, str]], dict[str, list[str]]]:
        """The settings of topics, and for those that could not be read, topics by reason."""
        if not topics:
            return {}, {}
        asked = [ConfigResource(ResourceType.TOPIC, topic) for topic in topics]
        configs: dict[str, dict[str, str]] = {}
        unread: dict[str, list[str]] = {}
        for resource, future in self._client.describe_configs(asked, request_timeout=KAFKA_TIMEOUT_S).items():
            try:
                entries = future.result(KAFKA_TIMEOUT_S + 1)
            except (KafkaException, TimeoutError) as error:
                unread.setdefault(reason(error), []).append(resource.name)
            else:
                configs[resource.name] = {name: entry.value for name, entry in entries.items()}
        return configs, unread

    def _topic(self, topic: str, named: bool, config: Mapping[str, str] | None) -> Iterator[Finding]:
        if topic not in self._topics:
            what = f"{topic} does not exist, or this user may not write to it: its records become dead letters"
            create = f"create it: `kafka-delivery doctor --create --topic {topic}`"
            if named:
                yield Finding("topic", "error", what, create)
            else:
                yield Finding("topic", "warning", what, f"unless it is a typo of a caller's, {create}")
            return
        partitions = self._topics[topic].partitions
        yield Finding("topic", "ok", f"{topic} has {len(partitions)} partition(s), {_copies(partitions)} replica(s)")
        if config is None:
            return
        yield _durability(topic, _copies(partitions), int(config["min.insync.replicas"]))
        limit, largest = int(config["max.message.bytes"]), self._settings.max_record_bytes
        what = f"{topic} takes {limit:,} bytes (max.message.bytes), a record may have {largest:,}"
        if limit >= largest:
            yield Finding("topic-size", "ok", what)
        else:
            do = "raise max.message.bytes of the topic, or lower KAFKA_DELIVERY_MAX_RECORD_BYTES"
            yield Finding("topic-size", "warning", f"{what}: those in between become dead letters", do)

    def _dead_letter_topic(self, topic: str, config: Mapping[str, str] | None) -> Iterator[Finding]:
        s = self._settings
        if topic not in self._topics:
            if s.create_dead_letter_topics:
                yield Finding("dead-letter-topic", "ok", f"{topic} does not exist yet; a worker creates it when needed")
                return
            what = f"{topic} does not exist, or this user may not write to it: dead letters are parked in Redis"
            do = "create it (`kafka-delivery doctor --create`), or set KAFKA_DELIVERY_CREATE_DEAD_LETTER_TOPICS=true"
            yield Finding("dead-letter-topic", "warning", what, do)
            return
        partitions = self._topics[topic].partitions
        if config is None:
            yield Finding("dead-letter-topic", "ok", f"{topic} exists")
            return
        kept = f"{topic} keeps dead letters {_retention(config)}"
        if "compact" in config["cleanup.policy"]:
            do = "set cleanup.policy of the topic to delete"
            what = f"{kept}, of each key only the last one, and takes none without a key (cleanup.policy compact)"
            yield Finding("dead-letter-topic", "warning", what, do)
        else:
            yield Finding("dead-letter-topic", "ok", kept)
        yield _durability(topic, _copies(partitions), int(config["min.insync.replicas"]))
        # Whatever its own topic takes, a record has max_record_bytes at most; one that was too large for its topic
        # is a dead letter of that size.
        limit, largest = int(config["max.message.bytes"]), s.max_record_bytes + DEAD_LETTER_HEADROOM_BYTES
        what = f"{topic} takes {limit:,} bytes (max.message.bytes), a dead letter may have {largest:,}"
        if limit >= largest:
            yield Finding("dead-letter-size", "ok", what)
        else:
            do = f"raise max.message.bytes of the topic to {largest} or more"
            yield Finding("dead-letter-size", "warning", f"{what}: larger ones are parked in Redis", do)


def _durability(topic: str, copies: int, least: int) -> Finding:
    """What `acks=all` is worth for a topic of so many replicas when `min.insync.replicas` is `least`."""
    check, what = "topic-durability", f"{topic} confirms a record when {least} of {copies} replica(s) have it"
    if least > copies:  # KAFKA-15583: since 3.7 the replicas that there are bound it
        what += f": older brokers than Kafka 3.7 refuse every record, newer ones take {copies} for enough"
        return Finding(check, "warning", what, "add replicas, or lower min.insync.replicas")
    if least == 1 < copies:
        do = "set min.insync.replicas of the topic to 2"
        return Finding(check, "warning", f"{what}: one that dies can take confirmed records with it", do)
    return Finding(check, "ok", what)


def _copies(partitions: Mapping[int, Any]) -> int:
    return min((len(partition.replicas) for partition in partitions.values()), default=0)


def _retention(config: Mapping[str, str]) -> str:
    ms, size = int(config["retention.ms"]), int(config["retention.bytes"])
    age = "for ever" if ms < 0 else f"for {ms / 86_400_000:.3g} day(s)"
    return age if size < 0 else f"{age} and up to {size:,} bytes a partition"


def _one_line(text: str) -> str:
    return " ".join(text.split())
