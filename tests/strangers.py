"""Messages by strangers: what anybody who can write to Redis may put into our queues, broken or evil.

`zoo` holds what no record can be made of. Each is to be parked, once, under an id that can be listed, shown and
discarded; the worker goes on, and what lies beside it is delivered. `forged` holds good records with headers that no
worker wrote: each is to be delivered, once.

Items never differ from call to call. The same one twice is the same content, which the parking store keeps once.
"""

from __future__ import annotations

import bz2
import functools
import json
import lzma
import zlib
from base64 import b64encode
from collections.abc import Callable
from typing import Any

QUEUE = "kafka-delivery"
TOPIC = "strangers"
SECRET = "secret-of-a-stranger"  # noqa: S105
"""In payloads and arguments; no log may show it."""

FORGED_LINE = "FORGED-LINE"
"""What ids and names of the zoo have behind a line break: no line of a log may begin with it."""

DEPTHS = (100, 500, 990, 1_000, 10_000, 100_000)

BREAKS = {
    "ESC": "\x1b[2J\x1b]0;owned\x07",
    "line feed": "\n",
    "carriage return": "\r",
    "C1": "\x9b31m\x85",
    "line separator": "\u2028",
    "bidi": "\u202e\u2066",
    "NUL": "\0",
    "half a character": "\ud800",
}
"""What a terminal, a reader of logs or an encoder stumbles over."""

CELERYS_TASKS = (
    "accumulate", "backend_cleanup", "chain", "chord", "chord_unlock", "chunks", "group", "map", "starmap",
)  # fmt: skip


ODD_PRIORITIES: list[Any] = [2**70, -5, "x", 1.5, [1], {}, True, None]


def wire(item_id: str, topic: str = TOPIC) -> list[Any]:
    """A record as our callers write it."""
    return [1, "default", topic, SECRET, None, [], None, 1_700_000_000_000, item_id]


def envelope(
    item_id: Any, body: Any = None, *, task: Any = "kafka_delivery.send", topic: str = TOPIC
) -> dict[str, Any]:
    """A message as our callers write it: a good one, if nothing of it is changed."""
    if body is None:
        body = json.dumps([[wire(item_id, topic)], {}, None])
    text = body if isinstance(body, bytes) else body.encode()
    return {
        "body": b64encode(text).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": task,
            "id": item_id,
            "eta": None,
            "expires": None,
            "group": None,
            "retries": 0,
            "timelimit": [None, None],
            "root_id": item_id,
            "parent_id": None,
            "argsrepr": "(...)",
            "kwargsrepr": "{}",
            "origin": "stranger",
            "ignore_result": True,
        },
        "properties": {
            "correlation_id": item_id,
            "reply_to": "stranger",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": item_id,
        },
    }


def zoo(big: bool = False) -> dict[str, bytes]:
    """Return what is to be parked: a name -> what to LPUSH into the list of `QUEUE`.

    Args:
        big: with messages of about a megabyte; without, none has more than 900 kB.
    """
    found: dict[str, bytes] = {}
    for family in (
        _no_message,
        _parts,
        _compressed,
        _nested,
        _named,
        _tasks,
        _batches,
        _headers,
        *([_big] if big else []),
    ):
        family(found)
    return found


def forged(topic: str, prefix: str = "forged") -> dict[str, bytes]:
    """Return good records for `topic` with headers that say what no worker says: message id -> what to LPUSH."""
    found: dict[str, bytes] = {}
    odd = [2**10**4, 2**63, -1, -(2**70), 1.5, 1e300, "9", "x", True, [1], {"a": 1}]
    counts = ("kafka_delivery_deferrals", "kafka_delivery_redrives")
    texts = ("kafka_delivery_revived", "kafka_delivery_probe", "kafka_delivery_released")
    for name in (*counts, *texts):
        for place, value in enumerate(odd):
            _forge(found, topic, f"{prefix}-{name}-{place}", _header(name, value))
        _forge(found, topic, f"{prefix}-{name}-inner", _header("headers", {name: 2**70}))
    for place, value in enumerate(ODD_PRIORITIES):
        _forge(found, topic, f"{prefix}-priority-{place}", _property("priority", value))
    return found


def _forge(found: dict[str, bytes], topic: str, item_id: str, spoil: Callable[[dict[str, Any]], Any]) -> None:
    made = envelope(item_id, topic=topic)
    spoil(made)
    found[item_id] = json.dumps(made).encode()


def _header(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda made: made["headers"].update({name: value})


def _property(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda made: made["properties"].update({name: value})


def _add(
    found: dict[str, bytes], name: str, spoil: Callable[[dict[str, Any]], Any], body: Any = None, **more: Any
) -> None:
    """A message that is good but for what `spoil` does to it."""
    made = envelope(f"stranger {name}", body, **more)
    spoil(made)
    found[name] = json.dumps(made).encode()


def _bad_body() -> str:
    """A call of `send` without a record."""
    return json.dumps([[[SECRET, {"a": SECRET}]], {}, None])


# -- families
def _no_message(found: dict[str, bytes]) -> None:
    good = json.dumps(envelope("stranger whole")).encode()
    found.update(
        {
            "no JSON": SECRET.encode(),
            "nothing": b"",
            "blank": b" \n ",
            "null": b"null",
            "a list": b"[]",
            "a number": b"1e999",
            "NaN": b"NaN",
            "a long number": b"9" * 5_000,
            "half a message": good[: len(good) // 2],
            "a message and more": good + b" garbage",
            "no UTF-8": b'{"body": "\xff\xfe\x80", "properties": {"delivery_info": {}}, "headers": {}}',
            "no UTF-8 in an id": good.replace(b"stranger whole", b"stranger \xff\xfe"),
            "NUL bytes": b"\0" * 1_000,
            "ESC bytes": b"\x1b[2J\n" + FORGED_LINE.encode() + b"\n",
            "a byte order mark": b"\xef\xbb\xbf" + json.dumps(envelope("stranger with a mark", _bad_body())).encode(),
            "UTF-16": json.dumps(envelope("stranger in UTF-16", _bad_body())).encode("utf-16"),
            "brackets": b"[" * 100_000,
            "braces": b'{"a":' * 100_000,
            "a queue and a line break": f"kafka-delivery\n{FORGED_LINE}".encode(),
        }
    )


def _parts(found: dict[str, bytes]) -> None:
    spoils: dict[str, Callable[[dict[str, Any]], Any]] = {
        "no properties": lambda e: e.pop("properties"),
        "properties null": lambda e: e.update(properties=None),
        "properties a list": lambda e: e.update(properties=[1]),
        "no headers": lambda e: e.pop("headers"),
        "headers text": lambda e: e.update(headers=FORGED_LINE),
        "headers empty": lambda e: e.update(headers={}),
        "delivery_info text": lambda e: e["properties"].update(delivery_info="x"),
        "delivery_info a list": lambda e: e["properties"].update(delivery_info=[{}]),
        "no body": lambda e: e.pop("body"),
        "body null": lambda e: e.update(body=None),
        "body a number": lambda e: e.update(body=1),
        "body an object": lambda e: e.update(body={"a": SECRET}),
        "body a list": lambda e: e.update(body=[SECRET]),
        "body no base64": lambda e: e.update(body="%%%" + SECRET),
        "body half a character": lambda e: (e.update(body="\ud800"), e["properties"].pop("body_encoding")),
        "body_encoding unknown": lambda e: e["properties"].update(body_encoding="rot13"),
        "body_encoding a list": lambda e: e["properties"].update(body_encoding=["base64"]),
        "content-type unknown": lambda e: e.update({"content-type": "application/x-unheard-of"}),
        "content-type pickle": lambda e: e.update({"content-type": "application/x-python-serialize"}),
        "content-type a list": lambda e: e.update({"content-type": ["application/json"]}),
        "content-type an object": lambda e: e.update({"content-type": {"a": 1}}),
        "content-type null": lambda e: e.update({"content-type": None}),
        "content-encoding a list": lambda e: (e.update({"content-encoding": ["x"]}), _spoil_body(e)),
        "content-encoding unknown": lambda e: (e.update({"content-encoding": "x-unheard-of"}), _spoil_body(e)),
        "delivery_tag an object": lambda e: (e["properties"].update(delivery_tag={"a": [1]}), _spoil_body(e)),
        "correlation_id an object": lambda e: (e["properties"].update(correlation_id={"a": [1]}), _spoil_body(e)),
        "reply_to an object": lambda e: (e["properties"].update(reply_to={"a": [1]}), _spoil_body(e)),
    }
    for name, spoil in spoils.items():
        _add(found, name, spoil)
    compact = envelope("stranger compact", _bad_body())
    found["compact JSON"] = json.dumps(compact, separators=(",", ":")).encode()
    found["roomy JSON"] = json.dumps(envelope("stranger roomy", _bad_body()), indent=4).encode()
    found["names escaped"] = found["compact JSON"].replace(b'"task"', b'"t\\u0061sk"').replace(b"compact", b"escaped")
    found["names twice"] = (
        found["compact JSON"]
        .replace(b'"headers":{', b'"headers":1,"headers":{"id":1,')
        .replace(b"stranger compact", b"stranger twice")
    )
    for name, body in {
        "arguments null": "null",
        "arguments a number": "1",
        "arguments an object": '{"args": [], "kwargs": {}, "id": 1}',
        "arguments four": "[[], {}, {}, {}]",
        "arguments no lists": '["x", "y", "z"]',
        "arguments with a type": '[[{"__type__": "datetime", "__value__": "never"}], {}, null]',
        "arguments no JSON": "[[",
        "arguments no UTF-8": b"[[\xff]]",
        "arguments NaN": "[[NaN], {}, null]",
        "arguments a long number": f"[[{'9' * 5_000}], {{}}, null]",
        "arguments many": json.dumps([[0] * 50_000, {}, None]),
        "arguments by strange names": json.dumps([[], {"self": 1, "\n" + FORGED_LINE: 2}, None]),
    }.items():
        _add(found, name, lambda e: None, body)


def _spoil_body(made: dict[str, Any]) -> dict[str, Any]:
    made["body"] = b64encode(_bad_body().encode()).decode()
    return made


def _compressed(found: dict[str, bytes]) -> None:
    bombs = _bombs()
    for name, body in bombs.items():
        _add(found, f"bomb of {name}", _header("compression", name), body)
    _add(
        found, "bomb of a bomb", lambda e: e["headers"].update(compression="gzip"),
        zlib.compress(zlib.compress(bombs["gzip"])),
    )  # fmt: skip
    _add(
        found, "bomb of many parts", lambda e: e["headers"].update(compression="bzip2"),
        bz2.compress(b"0" * 5_000_000) * 10,
    )  # fmt: skip
    garbage = {"gzip": b"garbage", "bzip2": b"BZh9garbage", "lzma": b"\xfd7zXZ\0garbage", "brotli": b"x", "zstd": b"x"}
    for name, body in garbage.items():
        _add(found, f"no {name}", _header("compression", name), body)
    good = zlib.compress(json.dumps([[wire("stranger half of gzip")], {}, None]).encode())
    _add(found, "half of gzip", lambda e: e["headers"].update(compression="gzip"), good[:-6])
    for place, value in enumerate(["unheard-of", 1, ["gzip"], {"gzip": 1}, True]):
        _add(found, f"compression {place}", _header("compression", value))


@functools.cache
def _bombs() -> dict[str, bytes]:
    """Of 60 MB each; made once, since that takes seconds."""
    zeros = b"0" * 60_000_000
    return {"gzip": zlib.compress(zeros), "bzip2": bz2.compress(zeros), "lzma": lzma.compress(zeros)}


def _nested(found: dict[str, bytes]) -> None:
    for depth in DEPTHS:
        deep = "[" * depth + "]" * depth
        objects = '{"a":' * depth + "1" + "}" * depth
        for where, text in (("headers", objects), ("properties", deep)):
            made = envelope(f"stranger {depth} deep in {where}", _bad_body())
            made[where]["deep"] = "DEEP"
            found[f"{depth} deep in {where}"] = json.dumps(made).replace('"DEEP"', text).encode()
        made = envelope(f"stranger {depth} deep in headers in headers", _bad_body())
        made["headers"]["headers"] = "DEEP"
        found[f"{depth} deep in headers in headers"] = json.dumps(made).replace('"DEEP"', objects).encode()
        for where, body in {
            "args": f"[[{deep}], {{}}, null]",
            "kwargs": f'[[], {{"value": {objects}}}, null]',
            "embed": f'[[], {{}}, {{"callbacks": {deep}}}]',
            "embed of a record": f'[[{json.dumps(wire(f"inner {depth}"))}], {{}}, {{"chain": {deep}}}]',
            "a value": f'[[[1, "default", "{TOPIC}", {deep}, null, [], null, 1, "x"]], {{}}, null]',
        }.items():
            name = f"{depth} deep in {where}"
            found[name] = json.dumps(envelope(f"stranger {name}", body)).encode()
    for where in ("id", "task"):
        _add(found, f"deep {where}", _header(where, json.loads("[" * 400 + "]" * 400)))


def _named(found: dict[str, bytes]) -> None:
    for name, text in BREAKS.items():
        strange = f"stranger {text}{FORGED_LINE}"
        for what in ("id", "topic", "task", "cluster", "reply"):
            made = envelope(strange if what == "id" else f"stranger {what} {name}", task=_name(what, "task", strange))
            record = wire(strange if what == "id" else f"stranger {what} {name}")
            if what == "topic":
                record[2] = strange
            elif what == "cluster":
                record[1] = strange
            elif what == "reply":
                made["properties"]["reply_to"] = made["headers"]["origin"] = strange
                made["headers"]["argsrepr"] = made["headers"]["kwargsrepr"] = strange
                record = [strange]
            made["body"] = b64encode(json.dumps([[record], {}, None]).encode()).decode()
            found[f"{what} with {name}"] = json.dumps(made).encode()
    for name, value in {"empty": "", "null": None, "a number": 7, "a list": ["x"], "an object": {"a": 1}}.items():
        made = envelope(value, json.dumps([[wire(f"stranger {name} id"), SECRET], {}, None]))
        found[f"id {name}"] = json.dumps(made).encode()
    long = "i" * 100_000
    found["id of 100,000 characters"] = json.dumps(envelope(long, _bad_body())).encode()


def _name(what: str, one: str, strange: str) -> str:
    return strange if what == one else "kafka_delivery.send"


def _tasks(found: dict[str, bytes]) -> None:
    for name in CELERYS_TASKS:
        call = json.dumps([[SECRET, [SECRET], [SECRET]], {"index": None}, None])
        _add(found, f"task celery.{name}", lambda e: None, call, task=f"celery.{name}")
    for place, task in enumerate(["os.system", "", "kafka_delivery", "__main__.send", "celery", "x" * 100_000]):
        _add(found, f"task {place} unknown", lambda e: None, _bad_body(), task=task)
    no_names: dict[str, Any] = {"null": None, "a number": 1, "a list": ["kafka_delivery.send"], "an object": {}}
    for name, value in no_names.items():
        _add(found, f"task {name}", lambda e: None, _bad_body(), task=value)


def _batches(found: dict[str, bytes]) -> None:
    batch = {"task": "kafka_delivery.send_many"}
    for name, body in {
        "batch of 100,000 zeros": json.dumps([[[0] * 100_000], {}, None]),
        "batch of 100,000 lists": json.dumps([[[[]] * 70_000], {}, None]),
        "batch of text": json.dumps([[SECRET], {}, None]),
        "batch of an object": json.dumps([[{"a": 1}], {}, None]),
        "batch of nothing": json.dumps([[], {}, None]),
        "batch of two": json.dumps([[[], []], {}, None]),
        "batch by name": json.dumps([[], {"record": []}, None]),
        "batch with more names": json.dumps([[[]], {"records": [], "x": 1}, None]),
    }.items():
        _add(found, name, lambda e: None, body, **batch)


def _headers(found: dict[str, bytes]) -> None:
    strange: dict[str, list[Any]] = {
        "eta": ["never", 1, [], {}, "9999-12-31T23:59:59-14:00"],
        "expires": ["never", [], {}, 1e300, "9999-12-31T23:59:59-14:00"],
        "timelimit": ["x", [1], [1, 2, 3], ["a", "b"], {"a": 1}, 7, [1e300, None], [None, -1], [True, None]],
        "retries": ["x", -1, 1.5, 2**70, 2**10**4, True, [1], {}],
        "group": [{"a": [1]}],
        "shadow": [{"a": 1}, ["x"], 7],
        "stamped_headers": [7, [7], {"a": 1}, "x"],
        "stamps": [7, [7], "x"],
        "root_id": [{"a": [1]}, 7],
        "parent_id": [{"a": [1]}, 7],
        "argsrepr": [{"a": [1]}, 7],
        "origin": [{"a": [1]}],
        "group_index": ["x", [1]],
        "replaced_task_nesting": ["x", [1], 2**70],
        "ignore_result": [{"a": [1]}, [1]],
        "lang": [{"a": [1]}],
        "is_eager": [True],
        "_children": [7],
        "called_directly": [True],
    }
    for name, values in strange.items():
        for place, value in enumerate(values):
            _add(found, f"{name} {place}", _header(name, value), _bad_body())
    made = envelope("stranger Infinity", _bad_body())
    made["headers"]["eta"] = float("inf")
    made["properties"]["priority"] = float("nan")
    found["numbers that JSON has not"] = json.dumps(made).encode()
    _add(found, "10,000 headers", lambda e: e["headers"].update({f"h{i}": 1 for i in range(10_000)}), _bad_body())


def _big(found: dict[str, bytes]) -> None:
    megabyte = 1_000_000
    found.update(
        {
            "1 MB of nothing": b"\0" * megabyte,
            "1 MB of quotes": b'"' * megabyte,
            "1 MB of tags": b'"delivery_tag": "' * (megabyte // 17),
            "1 MB of ids": b'"correlation_id": "x' * (megabyte // 20),
            "1 MB of compact tags": b'{"delivery_tag":"' * (megabyte // 17),
            "1 MB of etas": b'"eta": "2026-' * (megabyte // 13),
            "1 MB of spaces": b'{"delivery_tag":' + b" " * megabyte,
        }
    )
    value = SECRET * (megabyte // len(SECRET))
    made = envelope("stranger 1 MB compact", json.dumps([[value], {}, None], separators=(",", ":")))
    found["1 MB of compact JSON"] = json.dumps(made, separators=(",", ":")).encode()
    made = envelope("stranger 1 MB of headers", _bad_body())
    made["headers"] |= {f"h{place}": place for place in range(60_000)}
    found["1 MB of headers"] = json.dumps(made).encode()
    made = envelope("stranger 1 MB batch", json.dumps([[[0] * 300_000], {}, None]), task="kafka_delivery.send_many")
    found["300,000 zeros in a batch"] = json.dumps(made).encode()
    made = envelope("stranger 1 MB id", _bad_body())
    made["properties"]["correlation_id"] = "\n" + "c" * megabyte
    found["an id of 1 MB"] = json.dumps(made).encode()
