"""Builds every parked item: from a record, from a call, from a message, and from bytes that are no message.

The functions are pure: they read what they are given, and the settings. Each returns the items in order, so that
nothing is hidden behind another record:

* A record is parked as a record under its own message id, whatever it travelled in. Its topic, size and digest show.
* A batch is parked record by record. A member that is no valid record is an item of its own, a call of `send`.
* A call or a message that holds no record is parked as it is.

The same message always gives the same items, so that parking it again keeps each of them once. That is why a record
whose message does not say its time stays a call: the time would be another one at each look.
"""

from __future__ import annotations

import hashlib
import json
import logging
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from kombu.utils.json import dumps

from kafka_delivery import settings
from kafka_delivery.base import Refused, batch_from, is_too_many, record_from
from kafka_delivery.dead_letters import dead_letter
from kafka_delivery.marks import is_count
from kafka_delivery.names import DEAD_LETTER, DEFAULT_CLUSTER, REDRIVES, SEND, SEND_MANY
from kafka_delivery.record import MAX_MESSAGE_ID, Record, is_message_id

from . import task_ids
from .decoding import loads, unbase64
from .decompression import most_bytes
from .parking import Parked, fingerprint

log = logging.getLogger("kafka_delivery.parking")

T = TypeVar("T")

OURS = (SEND, SEND_MANY, DEAD_LETTER)

AS_IT_LAY = ("undecodable", "unknown-task", "invalid")
"""Kinds of which a message is kept as it lay in the queue: it is what a person, or a newer worker, has to look at."""

SPLIT_BYTES = 4 * 1024 * 1024
"""Of a message that killed workers. A longer one is kept whole: its size may be what kills."""

LONG_BYTES = 64 * 1024
"""From which on it matters how much longer JSON makes bytes: a byte that is no text takes seven."""

_TEXT = bytes({9, 10, 13, *range(32, 127)})

MAX_WORDS = 2_000
"""Characters of the reason. It may name an argument or a task, and a stranger may have made that name of any length."""

EMBEDDED = ("callbacks", "errbacks", "chain", "chord")
"""What a message asks of Celery beside the call, as Celery names it in the message's body."""

RELATIONS = ("root_id", "parent_id", "group", "group_index")
"""What a message says of the calls that it belongs to, as Celery names it in the message's headers."""

LINEAGE = ("root_id", "parent_id")
"""Of these, what also holds for each record of a batch."""

UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What reading something raises that is not what it says it is; `InvalidRecordError` is one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why something is parked; the fields are those of `Parked`."""

    kind: str
    error_class: str
    error_message: str
    error_code: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "error_message", self.error_message[:MAX_WORDS])


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call of a task.

    Attributes:
        task, id, args, kwargs: Celery's.
        retries: attempts that were used.
        redrives: how often it had been sent again from its dead-letter topic.
        asked: see `Parked.asked`.
    """

    task: str
    id: str
    args: Sequence[Any] = field(default=(), repr=False)
    kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)
    retries: int = 0
    redrives: int = 0
    asked: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, request: Any) -> Call:
        """The call of Celery's request or context, or of anything that has its `id`, `task`, `args` and `kwargs`."""
        headers = getattr(request, "headers", None) or {}
        known = {name: getattr(request, name, None) for name in (*EMBEDDED, *RELATIONS)}
        return cls(
            task=request.task,
            id=request.id,
            args=list(request.args or ()),
            kwargs=dict(request.kwargs or {}),
            retries=_count(request.retries),
            redrives=_count(headers.get(REDRIVES)),
            asked=asked_of(known, request.id),
        )


def asked_of(known: Mapping[str, Any], task_id: str) -> dict[str, Any]:
    """What a message asks of Celery beside the call, without what it does not ask.

    Args:
        known: by Celery's names, of `EMBEDDED` and `RELATIONS` at least.
        task_id: of the call. A call that is its own root, or its own parent as a retry is, belongs to no other.
    """
    asked = {name: known[name] for name in EMBEDDED if known.get(name)}
    asked |= {name: known[name] for name in RELATIONS if known.get(name) is not None}
    return {name: value for name, value in asked.items() if name not in LINEAGE or value != task_id}


def options_of(asked: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of `apply_async` that ask again what `Parked.asked` holds."""
    names = {"callbacks": "link", "errbacks": "link_error", "group": "group_id"}
    return {names.get(name, name): value for name, value in (asked or {}).items()}


# -- what each kind of thing is parked as
def of_record(
    record: Record,
    why: Reason,
    *,
    retries: int = 0,
    redrives: int = 0,
    asked: dict[str, Any] | None = None,
) -> Parked:
    """The item of one record."""
    return Parked(
        id=record.id,
        kind=why.kind,
        error_class=why.error_class,
        error_code=why.error_code,
        error_message=why.error_message,
        retry_count=retries,
        redrive_count=redrives,
        topic=record.topic,
        content="record",
        data=record.to_wire(settings.current().cluster),
        asked=asked or None,
        **fingerprint(record.value_bytes),
    )


def of_call(call: Call, why: Reason) -> list[Parked]:
    """The items of one call: of a batch its members, of a send or a dead letter its record, else the call."""
    return _read(_records_of, call, why) or [_of_call(call, why)]


def of_message(
    queue: Any, envelope: dict[str, Any], headers: Mapping[str, Any], body: bytes | None, why: Reason
) -> list[Parked]:
    """The items of a message.

    Args:
        queue: where it came from.
        envelope: what it is kept as, if it is kept whole.
        headers: Celery's.
        body: as its publisher encoded it, decompressed; None where it cannot be had.
        why: the reason. Of a kind in `AS_IT_LAY` a single record stays in its message.
    """
    readable = body is not None and len(body) <= most_bytes()
    call = _read(_call_in, headers, envelope.get("content-type"), body) if readable else None
    data = {"queue": queue, "envelope": envelope}
    return _of_message(call, _id_of(headers, envelope.get("properties")) or _made_up_of(envelope), data, why)


def of_raw(queue: str, raw: str, why: Reason, apart: bool = True) -> list[Parked]:
    """The items of a message that no worker shall decode as Celery would, since it killed some.

    It is read as plain JSON and base64. What cannot be read so, or fails on the way, or is too long, is kept whole.

    Args:
        queue: where it came from.
        raw: its envelope; bytes that are no UTF-8 as Python's surrogate escapes.
        why: the reason.
        apart: whether it may be read at all.
    """
    data = {"queue": queue, **as_kept(raw.encode(errors="surrogateescape"))}
    call = _read(_call_in_raw, raw) if apart and len(raw) <= SPLIT_BYTES else None
    return _of_message(call, _id_in(raw), data, why)


def of_bytes(queue: str, raw: bytes, why: Reason) -> Parked:
    """The item of bytes that are no message."""
    data = {"queue": queue, **as_kept(raw)}
    return _whole(_made_up("garbage", raw), data, why)


def as_kept(raw: bytes) -> dict[str, str]:
    """Bytes as a parked message holds them: as text, or as base64 where JSON would make it several times as long."""
    if len(raw) > LONG_BYTES and len(raw.translate(None, _TEXT)) > len(raw) // 10:
        return {"base64": b64encode(raw).decode()}
    return {"raw": raw.decode(errors="surrogateescape")}


def as_it_lay(data: Mapping[str, Any]) -> bytes:
    """The bytes of a parked message; of one that was read, as kombu writes it."""
    if "base64" in data:
        return b64decode(data["base64"])
    if "raw" in data:
        return str(data["raw"]).encode(errors="surrogateescape")
    return str(dumps(data["envelope"])).encode()


# -- how
def _read(read: Callable[..., T], *arguments: Any) -> T | None:
    """What `read` returns; None where it fails. Then a thing is kept whole, and nothing waits behind it."""
    try:
        return read(*arguments)
    except UNREADABLE:
        return None
    except Exception as error:  # nobody planned it
        log.warning("parked.kept_whole error=%s", type(error).__name__)
        return None


def _of_message(call: Call | None, item_id: str, data: dict[str, Any], why: Reason) -> list[Parked]:
    if call is not None and (call.task == SEND_MANY or why.kind not in AS_IT_LAY):
        items = _read(_records_of, call, why)
        if items:
            return items
    return [_whole(item_id, data, why, call)]


def _whole(item_id: str, data: dict[str, Any], why: Reason, call: Call | None = None) -> Parked:
    return Parked(
        id=item_id,
        kind=why.kind,
        error_class=why.error_class,
        error_code=why.error_code,
        error_message=why.error_message,
        content="message",
        data=data,
        **((call and _read(_known_of, call)) or {}),
    )


def _of_call(call: Call, why: Reason) -> Parked:
    return Parked(
        id=printable(call.id),
        kind=why.kind,
        error_class=why.error_class,
        error_code=why.error_code,
        error_message=why.error_message,
        content="call",
        data={"task": call.task, "id": call.id, "args": list(call.args), "kwargs": dict(call.kwargs)} | _cluster(),
        asked=call.asked or None,
        **(_read(_known_of, call) or {}),
    )


def _cluster() -> dict[str, str]:
    """The Kafka cluster that a call is for, which plain arguments do not say; nothing for the default one."""
    name = settings.current().cluster
    return {} if name == DEFAULT_CLUSTER else {"cluster": name}


def _known_of(call: Call) -> dict[str, Any]:
    """What `Parked` can show of a call that is kept as it is."""
    known: dict[str, Any] = {"retry_count": call.retries, "redrive_count": call.redrives}
    record = _read(_record_of, call)
    return known if record is None else known | {"topic": record.topic} | fingerprint(record.value_bytes)


def _record_of(call: Call) -> Record | None:
    if call.task == DEAD_LETTER:
        return dead_letter.letter(call.args, call.kwargs, call.id)[0]
    return record_from(call.args, call.kwargs, None) if call.task == SEND else None


def _records_of(call: Call, why: Reason) -> list[Parked]:
    """The items of the records that a call is about; none where it is kept as it is."""
    if call.task == SEND_MANY:
        return _members_of(call, why)
    if call.task not in (SEND, DEAD_LETTER):
        return []
    if call.task == DEAD_LETTER and call.asked.keys() & {*EMBEDDED}:
        return []  # they wait for the dead letter, and the record would be redriven as a send
    record = Record.from_wire(call.args[0], settings.current().cluster)
    retries, redrives = call.retries, call.redrives
    if call.task == DEAD_LETTER:
        _, letter = dead_letter.letter(call.args, call.kwargs, None)
        retries, redrives = letter["retry_count"], letter["redrive_count"]
        text = f"{letter['error_class']}: {letter['error_message']}; then its dead letter was parked: "
        why = replace(why, error_message=text + why.error_message)
    return [of_record(record, why, retries=retries, redrives=redrives, asked=call.asked)]


def _members_of(batch: Call, why: Reason) -> list[Parked]:
    """The items of a batch's members, in order; none where it is kept whole.

    That is so where something waits for the batch as a whole: a callback, the next step of a chain, a chord. It is to
    be called once, after all of its records and with what became of each, which no member of it can stand for. It is
    so, too, where it has more members than any caller's: they would fill the store.
    """
    given: Iterable[Any] = batch.kwargs["records"] if batch.kwargs else batch.args[0]
    if batch.asked.keys() & {*EMBEDDED} or is_too_many(given):
        return []
    members = batch_from(batch.args, batch.kwargs, batch.id)
    asked = {name: batch.asked[name] for name in LINEAGE if name in batch.asked}
    items = []
    for member, as_given in zip(members, given, strict=True):
        if isinstance(member, Record) and _tells_its_time(as_given):
            items.append(of_record(member, why, retries=batch.retries, redrives=batch.redrives, asked=asked))
        else:
            items.append(_of_call(_alone(member, as_given, batch, asked), why))
    return items


def _alone(member: Record | Refused, as_given: Any, batch: Call, asked: dict[str, Any]) -> Call:
    """A member of a batch as a call of `send`."""
    if isinstance(member, Record):
        task_id, args, kwargs = member.id, [], {**as_given, "message_id": member.id}
    else:
        refused = member.as_call(SEND)
        own = as_given[-1] if isinstance(as_given, list) and as_given else None
        task_id, args, kwargs = str(own) if is_message_id(own) else refused.id, list(refused.args), refused.kwargs
    return Call(task=SEND, id=task_id, args=args, kwargs=kwargs, retries=batch.retries, asked=asked)


def _tells_its_time(as_given: Any) -> bool:
    return isinstance(as_given, list) or as_given.get("timestamp") is not None


# -- what a message says, read without Celery
def _call_in(headers: Mapping[str, Any], content_type: Any, body: bytes) -> Call | None:
    """The call of one of our tasks that a message carries in plain JSON; None for any other."""
    task, task_id = headers.get("task"), headers.get("id")
    if task not in OURS or not isinstance(task_id, str) or content_type != "application/json":
        return None
    args, kwargs, embed = loads(body)
    return Call(
        task=task,
        id=task_id,
        args=args,
        kwargs=kwargs,
        retries=_count(headers.get("retries")),
        redrives=_count(headers.get(REDRIVES)),
        asked=asked_of({**headers, **(embed or {})}, task_id),
    )


def _call_in_raw(raw: str) -> Call | None:
    """The same of an envelope as it lies in a queue."""
    envelope = loads(raw)
    headers, body = envelope["headers"], envelope["body"]
    if headers.get("compression"):
        return None
    encoded = envelope["properties"].get("body_encoding") == "base64"
    return _call_in(headers, envelope.get("content-type"), unbase64(body) if encoded else body.encode())


def _id_in(raw: str) -> str:
    """The task id in an envelope, found as text: what the envelope holds may be what kills."""
    encoded = raw.encode(errors="surrogateescape")
    found = task_ids.id_in(encoded)
    return printable(found) if found else _made_up("poison", encoded)


def message_ids(item: Parked) -> list[str]:
    """The message ids of the records that are parked in an item: of a batch that was kept whole all of its own."""
    if item.content != "call" or item.data["task"] != SEND_MANY:
        return [item.message_id]
    members = _read(_some_of, item.data["args"], item.data["kwargs"], item.data["id"])
    return [member.id for member in members or []]


def _some_of(args: Any, kwargs: Any, batch_id: str) -> list[Record | Refused]:
    return [] if any(map(is_too_many, (*args, *kwargs.values()))) else batch_from(args, kwargs, batch_id)


def body_of(message: Any) -> bytes | None:
    """The body of one of kombu's messages, decompressed; None where it cannot be had."""
    if message.errors:  # it could not be decompressed
        return None
    try:
        body = message.body
    except UNREADABLE:
        return None
    return body.encode() if isinstance(body, str) else bytes(body)


def id_of(message: Any) -> str:
    """The id that a message says it has, of its task or else of its envelope, as it is parked; "" where it has none."""
    return _id_of(message.headers, message.properties)


def _id_of(headers: Any, properties: Any) -> str:
    for part, name in ((headers, "id"), (properties, "correlation_id")):
        found = part.get(name) if isinstance(part, Mapping) else None
        if found and isinstance(found, str | int | float):
            return printable(str(found))
    return ""


def _made_up(kind: str, raw: bytes) -> str:
    """An id for what has none: the same for the same bytes, so that parking them again keeps them once."""
    return f"{kind}-{hashlib.sha256(raw).hexdigest()[:32]}"


def _made_up_of(envelope: dict[str, Any]) -> str:
    return _made_up("message", dumps(envelope).encode(errors="surrogatepass"))


def printable(text: str) -> str:
    """`text` as an id of a parked item: printable ASCII, and no longer than a message id."""
    if is_message_id(text):
        return text
    start = text[:MAX_MESSAGE_ID]
    return "".join(one if " " <= one <= "~" else _escaped(one) for one in start)[:MAX_MESSAGE_ID]


def _escaped(one: str) -> str:
    return json.dumps(one)[1:-1]


def _count(number: Any) -> int:
    return number if is_count(number) else 0
