"""Make one librdkafka client, and say in a few words why it cannot be made.

A client needs more than its properties: files with certificates, a token, threads, a plugin. All of these can be away
for a while. `connect` raises `NotMadeError` then, and the next try may succeed.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import monotonic, time
from typing import Any, TypeAlias

import confluent_kafka
from confluent_kafka import KafkaException

log = logging.getLogger("kafka_delivery.producer")


class FewerFailures(logging.Filter):
    """Lets one line pass for each broker that cannot be reached, and the next one after a while.

    librdkafka logs each try to connect. While Kafka is away, who waits for its first answer makes it try each broker
    several times a second.
    """

    PAUSE_S = 10.0
    MOST = 1_000
    """Brokers that are remembered."""

    def __init__(self) -> None:
        super().__init__()
        self._said_at: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        found = _FAIL.match(record.getMessage())
        if found is None:
            return True
        said_at = self._said_at.get(found[1])
        if said_at is not None and monotonic() - said_at < self.PAUSE_S:
            return False
        if len(self._said_at) >= self.MOST:
            self._said_at.clear()
        self._said_at[found[1]] = monotonic()
        return True


_FAIL = re.compile(r"FAIL \[[^\]]*\] \[thrd:([^\]]*)\]")

librdkafka_log = logging.getLogger("kafka_delivery.librdkafka")
librdkafka_log.addFilter(FewerFailures())

FILES = (
    "ssl.ca.location",
    "ssl.certificate.location",
    "ssl.key.location",
    "ssl.keystore.location",
    "ssl.crl.location",
)
"""Properties that name a file, which librdkafka reads once, when a client is made."""

SURROUNDINGS = (
    *FILES,
    "ssl.certificate.pem",  # these two belong to a key or a certificate in a file
    "ssl.key.pem",
    "ssl.engine.location",
    "ssl.engine.id",
    "ssl.providers",
    "plugin.library.paths",
)
"""Properties whose value may be right while what they name is not there."""

TOKEN_S = 10.0
"""Longest wait for a token. librdkafka itself gives a new client ten seconds."""

OAUTH_CB = "KAFKA_DELIVERY_OAUTH_CB"

ASKED_TOPIC = "__consumer_offsets"
"""The topic that Kafka is asked about for its id: its own, so that asking creates no topic that people notice."""

_OPENSSL = re.compile(r"error:[0-9A-F]+:[^:]*:[^:]*:([\w ]+)")
_QUOTED = re.compile(r'property[: ]+"([^"]+)"')
_PROPERTY = re.compile(r"[a-z][a-z0-9]*(?:\.[a-z0-9]+)+")

Token: TypeAlias = tuple[Any, ...]
"""Token, expiry in seconds since the epoch, and optionally principal and extensions."""

Identity: TypeAlias = tuple[int, int, int]
"""Changes with the content of a file: modification time (ns), size, inode."""


class NotMadeError(Exception):
    """Raised when a client cannot be made now. The text is a reason without secrets."""


@cache
def own_class() -> Any:
    """Confluent's own class `Producer`, whatever stands in its place.

    Tracers replace the class by a subclass, before or after our import. Some look for arguments by name, some turn the
    headers into a dictionary: repeated names are lost, or the record is refused. The class of the C extension is the
    only one of its name that is derived from `object` itself.
    """
    for one in object.__subclasses__():
        if one.__name__ == "Producer" and one.__module__.rpartition(".")[2] == "cimpl":
            return one
    return confluent_kafka.Producer


def kafka_id(client: Any, timeout_s: float) -> str:
    """Return the id of the Kafka that a client is connected to; "" if that has none.

    It comes with an answer about a topic, which need not be there. Any topic would do.

    Raises:
        KafkaException: no broker answers within `timeout_s`.
    """
    return client.list_topics(ASKED_TOPIC, timeout_s).cluster_id or ""


@dataclass(eq=False, slots=True)
class Connection:
    """A client and what belongs to it.

    Attributes:
        produce: the client's method.
        files: what its files were like when it was made.
        current: it takes new records.
        failed: it has had a fatal error.
    """

    client: Any
    produce: Callable[..., None]
    tokens: Tokens | None
    files: Mapping[str, Identity | None]
    current: bool = True
    failed: bool = False

    def close(self) -> None:
        """End the client; it should be empty, since what it holds is waited for."""
        if self.tokens is not None:
            self.tokens.stop()  # the client waits for the thread that waits for a token
        self.client.close()


def connect(
    properties: Mapping[str, Any],
    on_error: Callable[..., None],
    source: TokenSource | None = None,
    token_s: float | None = None,
) -> Connection:
    """Make a client.

    Args:
        properties: of librdkafka, without a token function.
        on_error: its ``error_cb``.
        source: of tokens, if it needs any.
        token_s: longest wait for the first token, in seconds; by default `TOKEN_S`.

    Raises:
        NotMadeError: it cannot be made now.
    """
    files = identities(properties)  # first: a file that changes meanwhile is noticed later
    _refuse_unreadable(properties)
    given = {**properties, "error_cb": on_error}
    tokens = None
    if source is not None:
        given["oauth_cb"] = tokens = Tokens(source)
        tokens.first = source.ask(properties.get("sasl.oauthbearer.config"), TOKEN_S if token_s is None else token_s)
    try:
        client = own_class()(given, logger=librdkafka_log)
    except Exception as error:  # threads, memory, files: whatever it is, the next try may succeed
        raise NotMadeError(reason(error, properties)) from None
    return Connection(client, client.produce, tokens, files)


def identities(properties: Mapping[str, Any]) -> dict[str, Identity | None]:
    """What the files that these properties name are like now; None for one that is not there.

    Links are followed, so that a Kubernetes volume changes when its ``..data`` points elsewhere.
    """
    return {name: _identity(path) for name, path in _paths(properties).items()}


def _paths(properties: Mapping[str, Any]) -> dict[str, str]:
    """The files that are read: those of other protocols are not."""
    if "ssl" not in str(properties.get("security.protocol", "")).lower():
        return {}
    named = {name: str(properties[name]) for name in FILES if properties.get(name)}
    return {name: path for name, path in named.items() if (name, path) != ("ssl.ca.location", "probe")}


def _identity(path: str) -> Identity | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _refuse_unreadable(properties: Mapping[str, Any]) -> None:
    """Name a file that cannot be read; librdkafka's words for that are OpenSSL's."""
    for name, path in _paths(properties).items():
        if Path(path).is_dir():  # of authorities
            continue
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise NotMadeError(f"{name}: {error.strerror}: {path}") from None


def reason(error: Exception, properties: Mapping[str, Any]) -> str:
    """`error` as the name of a property and of an error; never a value, which librdkafka may quote."""
    if not isinstance(error, KafkaException):
        return type(error).__name__
    name, text = error.args[0].name(), error.args[0].str()
    if "dlopen" in text:
        return f"plugin.library.paths: {name}"
    quoted = _QUOTED.search(text)
    named = quoted[1] if quoted else next((word for word in _PROPERTY.findall(text) if word in properties), "")
    openssl = _OPENSSL.search(text)
    detail = f"{name}, {openssl[1]}" if openssl else name
    return f"{named}: {detail}" if named else detail


class TokenSource:
    """The application's token function, called in a thread of ours.

    librdkafka would call it in its own, and wait for that thread when a client ends. Here a function that hangs holds
    up nobody, and it is not called again before it has returned.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self.changed = threading.Condition()
        self._call: _Call | None = None

    def ask(self, config: Any, timeout_s: float, stopped: Callable[[], bool] = lambda: False) -> Token:
        """Return a token.

        Raises:
            NotMadeError: there is none within `timeout_s` seconds, or before `stopped`.
        """
        with self.changed:
            call = self._call = self._call or self._begin(config)
            self.changed.wait_for(lambda: call.over or stopped(), timeout_s)
            if not call.over:
                raise NotMadeError(f"{OAUTH_CB}: no token within {timeout_s:g} s")
            self._call = None
        if call.error:
            raise NotMadeError(f"{OAUTH_CB}: {call.error}")
        return call.token

    def _begin(self, config: Any) -> _Call:
        call = _Call()
        try:
            threading.Thread(target=self._run, args=(call, config), name="kafka-delivery-token", daemon=True).start()
        except RuntimeError as error:
            raise NotMadeError(f"no thread for {OAUTH_CB}: {type(error).__name__}") from None
        return call

    def _run(self, call: _Call, config: Any) -> None:
        try:
            call.token = token = self._function(config)
            call.error = _fault(token)
        except BaseException as error:  # also a SystemExit is only this function's
            call.error = f"it raised {type(error).__name__}"
        with self.changed:
            call.over = True
            self.changed.notify_all()


class _Call:
    """One call of the token function."""

    token: Token = ()
    error = ""
    over = False


def _fault(token: Any) -> str:
    """What is wrong with it, or "". The client would not ask again after some of these."""
    well_formed = (
        isinstance(token, tuple)
        and 2 <= len(token) <= 4
        and isinstance(token[0], str)
        and isinstance(token[1], int | float)
        and all(isinstance(principal, str) for principal in token[2:3])
        and all(isinstance(extensions, dict) for extensions in token[3:])
        and all(isinstance(part, str) for extensions in token[3:] for pair in extensions.items() for part in pair)
    )
    if not well_formed:
        return "it must return a tuple (token, expiry in seconds since the epoch[, principal[, extensions]])"
    return "" if token[1] > time() else "its token has expired"


class Tokens:
    """The token function of one client: librdkafka calls it, in a thread of the client's."""

    def __init__(self, source: TokenSource) -> None:
        self._source = source
        self._stopped = False
        self.first: Token | None = None
        """What the client is made with: it was asked for before."""

    def __call__(self, config: Any) -> Token:
        first, self.first = self.first, None
        if first is not None:
            return first
        try:
            return self._source.ask(config, TOKEN_S, lambda: self._stopped)
        except NotMadeError as error:
            if not self._stopped:
                log.warning("producer.no_token reason=%r", str(error))
            raise

    def stop(self) -> None:
        """Let no call wait any longer."""
        with self._source.changed:
            self._stopped = True
            self._source.changed.notify_all()
