"""What is wrong with a Redis that does not do what it was asked, and what an operator does about it: the one place."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from typing import NamedTuple

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    InvalidResponse,
    RedisError,
    TimeoutError,
)
from redis.sentinel import MasterNotFoundError

from kafka_delivery.faults import text_of
from kafka_delivery.settings import Settings

RIGHT_URL = "is KAFKA_DELIVERY_REDIS_URL right?"
"""Asked only where nothing that answers is a Redis of ours."""

BOTH_TLS = "Is the port right, and is TLS on both sides (rediss://) or on neither (redis://)?"


class Fault(NamedTuple):
    """What is wrong, and what to do about it, each as sentences; neither holds a secret."""

    what: str
    do: str


ANSWERS = {
    "BUSY": Fault(
        "it is connected, and a script has blocked it for seconds",
        "Wait and try again. `redis-cli SCRIPT KILL` ends a script that has written nothing yet",
    ),
    "LOADING": Fault(
        "it is connected, and reads its data from disk: it answers nothing before that is done",
        "Wait and try again; `redis-cli INFO persistence` says how far it is",
    ),
    "NOAUTH": Fault("it wants a password", "Put the user and the password into KAFKA_DELIVERY_REDIS_URL"),
    "WRONGPASS": Fault(
        "it refuses this user or this password",
        "Correct them in KAFKA_DELIVERY_REDIS_URL; special characters of a password are percent-encoded",
    ),
    "NOPERM": Fault("it forbids this user that command", "Allow the user what it says (ACL SETUSER)"),
    "OOM": Fault(
        "it is full and refuses what needs memory",
        "Raise its maxmemory; workers go on emptying the queues, and `kafka-delivery parked discard` makes room",
    ),
    "READONLY": Fault(
        "it is a replica and refuses writes",
        "Name the primary in KAFKA_DELIVERY_REDIS_URL, or the Sentinels. After a failover, try again",
    ),
    "MASTERDOWN": Fault(
        "it is a replica that has lost its primary",
        "Name the primary in KAFKA_DELIVERY_REDIS_URL, or the Sentinels. After a failover, try again",
    ),
    "MISCONF": Fault(
        "it cannot write to its disk and refuses all writes",
        "Free its disk, or look in its log; it takes writes again by itself",
    ),
    "NOREPLICAS": Fault(
        "fewer replicas follow it than it wants, and it refuses writes",
        "Bring the replicas back, or lower min-replicas-to-write",
    ),
    "MAXCLIENTS": Fault("it has as many clients as it may have", "Raise its maxclients, or stop clients"),
    "DATABASE": Fault("it has no database of that number", "Correct the number at the end of KAFKA_DELIVERY_REDIS_URL"),
}
"""By the word with which Redis begins such an answer. It is connected then, so the URL names a Redis."""

_SAID = (
    ("BUSY", r"\bBUSY "),
    ("LOADING", r"(LOADING |is loading the dataset)"),
    ("NOAUTH", r"(NOAUTH |Authentication required|HELLO must be called with)"),
    ("WRONGPASS", r"(WRONGPASS |invalid username-password|invalid password|Client sent AUTH)"),
    ("NOPERM", r"(NOPERM |No permissions|(this user|User \S+) has no permissions)"),
    ("OOM", r"(OOM |command not allowed when used memory)"),
    ("READONLY", r"(READONLY |You can't write against a read only)"),
    ("MASTERDOWN", r"(MASTERDOWN |Link with MASTER is down)"),
    ("MISCONF", r"MISCONF "),
    ("NOREPLICAS", r"NOREPLICAS "),
    ("MAXCLIENTS", r"(ERR )?max number of clients"),
    ("DATABASE", r"(ERR )?DB index is out of range"),
)
"""How redis-py tells them: of some answers it keeps the first word, of others it makes a class and drops it."""


def explained(error: BaseException, s: Settings) -> Fault:
    """What such an error of Redis means, and what to do."""
    causes = list(_causes(error))
    text = text_of(causes[-1] if causes else error)
    for word, said in _SAID:
        if re.search(said, text):
            return ANSWERS[word]
    for one in causes:
        if isinstance(one, BusyLoadingError):
            return ANSWERS["LOADING"]
        if isinstance(one, AuthenticationError):
            return ANSWERS["WRONGPASS"]
    return _of_the_connection(causes, text, s)


def sentence(error: BaseException, s: Settings) -> str:
    """The same in one line, with where that Redis is and with its own words."""
    said = " ".join(text_of(error).split())
    if not s.queue_on_redis and not any(isinstance(one, RedisError) for one in _causes(error)):
        return f"the broker at {place(s.broker_url)}: {said}; is KAFKA_DELIVERY_BROKER_URL right?"
    what, do = explained(error, s)
    return f"Redis at {place(s.redis_url)}: {what} ({said}). {do}; `kafka-delivery doctor` says more"


def place(url: str) -> str:
    """The servers that `url` names, without users, passwords and options, even where it is not well-formed."""
    without_users = re.sub(r"://(?:(?!://).)*@", "://", url)
    return re.sub(r"\?[^;]*", "", without_users)


def _of_the_connection(causes: list[BaseException], text: str, s: Settings) -> Fault:
    """Of an error that is no answer of Redis."""
    tls = s.redis_url.lower().startswith("rediss://")
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return Fault("its certificate is not trusted", "Name its CA: ?ssl_ca_certs=/path/to/ca.pem in the URL")
    if any(isinstance(one, InvalidResponse | ssl.SSLError) for one in causes) or "SSL" in text:
        return Fault("what answers there does not speak as a Redis does", f"{BOTH_TLS} {_upper(RIGHT_URL)}")
    if any(isinstance(one, MasterNotFoundError) for one in causes):
        return Fault("no Sentinel knows a primary", f"Do the Sentinels run, do they know that name, and {RIGHT_URL}")
    if any(isinstance(one, TimeoutError) for one in causes):
        if "connecting" not in text:
            return Fault(
                "it is connected, and has not answered in time",
                "It is busy, frozen or swapping, or the network is slow or cut. Look at its host, at `redis-cli "
                "--latency` and at SLOWLOG, and try again",
            )
        handshake = " TLS may not be spoken there: redis:// is without." if tls else ""
        return Fault("it cannot be connected in time", f"Does a firewall drop it, and {RIGHT_URL}{handshake}")
    if re.search(r"refused|No such file", text):
        return Fault("nothing listens there", f"Does Redis run, and {RIGHT_URL}")
    if re.search(r"not known|resolution|No address|nodename", text):
        return Fault("its name is not known here", f"Does this machine know it (DNS), and {RIGHT_URL}")
    if re.search(r"closed by server|reset by peer|Broken pipe|while reading", text):
        return Fault("it closed the connection", f"If it has just restarted, try again. {BOTH_TLS}")
    if "connecting" in text:
        return Fault("it cannot be connected", f"Does Redis run, may this machine reach it, and {RIGHT_URL}")
    return Fault("it does not do what it was asked", "Look in its log")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The errors behind one, without those that only pass another one on: kombu's; the last is Redis's own."""
    while error is not None:
        if isinstance(error, RedisError | OSError):
            yield error
            if isinstance(error, RedisError):
                return
        error = error.__cause__


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]
